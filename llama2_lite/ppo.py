"""PPO.

Exported from book/15_ppo.md, which explains every part. Edit it there,
then `make export`.
"""

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llama2_lite.chat import (
    Dialog,
    Example,
    collate,
    encode_dialog,
    pack,
    separate_samples,
)
from llama2_lite.generation import for_decoding, generate
from llama2_lite.model import Llama, read_config
from llama2_lite.pretraining import (
    LayOut,
    MixedLengthLoader,
    configure_optimizer,
    on_one_device,
    processes,
    whole,
)
from llama2_lite.rejection import Score
from llama2_lite.reward import RewardConfig, RewardModel, pad_rows, token_logprobs
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Oracle


def check_shapes(**tensors: Tensor) -> None:
    """Refuse tensors of different shapes, which PyTorch might broadcast.

    Raises:
        ValueError: with the shapes by name.
    """
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items())
        raise ValueError(f"these must have one shape, but are {shapes}")


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip: float = 0.2,
) -> Tensor:
    """Clipped surrogate objective of PPO, to be minimised; a mean over tokens.

    Source: Schulman et al., 2017, equation 7; paper §3.2.3 for the threshold.

    Args:
        logprobs: of the tokens under the policy, (B, T).
        old_logprobs: under the policy that wrote them, (B, T).
        advantages: (B, T).
        mask: which tokens count, bool, (B, T).
        clip: how far a ratio of probabilities may be from 1 and still be rewarded.

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask
    )
    ratio = (logprobs - old_logprobs)[mask].exp()  # (N,)
    gain = advantages[mask]
    return -torch.min(ratio * gain, ratio.clamp(1 - clip, 1 + clip) * gain).mean()


def generalized_advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """How much better each token turned out than was expected before it.

    Source: Schulman et al., 2016; the paper does not say how it estimates advantages.

    Args:
        rewards: of each token, (B, T).
        values: expected sum of rewards from this token on, (B, T).
        mask: which tokens are part of the answer, bool, (B, T).
        gamma: discount of a token.
        lam: 0 trusts the next value, 1 trusts the rewards alone.
        bootstrap: value of what would follow the last token, (B,); 0 if left out.

    Returns:
        Advantages and returns (advantages + values), (B, T), 0 outside of the mask.

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    next_value = torch.zeros_like(values[:, 0]) if bootstrap is None else bootstrap
    check_shapes(bootstrap=next_value, row=values[:, 0])
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        surprise = rewards[:, t] + gamma * next_value - values[:, t]
        here = mask[:, t]
        next_advantage = torch.where(
            here, surprise + gamma * lam * next_advantage, next_advantage
        )
        next_value = torch.where(here, values[:, t], next_value)
        advantages[:, t] = next_advantage.masked_fill(~here, 0)
    return advantages, (advantages + values).masked_fill(~mask, 0)


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float = 0.2
) -> Tensor:
    """Half the squared error of the values, clipped; a mean over tokens.

    A value that has moved by more than ``clip`` gains nothing by moving on. Source:
    Schulman et al., 2017, as OpenAI's code has it; the paper gives no value loss.

    Args:
        values, old_values: now, and when the answers were written, (B, T).
        returns: what the values should be, (B, T).
        mask: which tokens count, bool, (B, T).

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    now, old, wanted = (x[mask] for x in (values, old_values, returns))
    near = old + (now - old).clamp(-clip, clip)
    return torch.max((now - wanted) ** 2, (near - wanted) ** 2).mean() / 2


GATE = 0.15


def combined_reward(
    helpfulness: Tensor, safety: Tensor, is_safety_prompt: Tensor
) -> Tensor:
    """Logit of the paper's R_c: safety where it is at stake, else helpfulness.

    A sigmoid and its inverse cancel, so that raw scores go in and one of them comes
    out; the threshold of 0.15 becomes its logit. Source: paper §3.2.3.

    Args:
        helpfulness, safety: raw scores of the two reward models, (B,).
        is_safety_prompt: whether the prompt was tagged as one that may elicit unsafe
            answers, bool, (B,).

    Raises:
        ValueError: if the shapes differ.
    """
    check_shapes(helpfulness=helpfulness, safety=safety, is_safety=is_safety_prompt)
    at_stake = is_safety_prompt | (safety < math.log(GATE / (1 - GATE)))
    return torch.where(at_stake, safety, helpfulness)


def whiten(scores: Tensor, mask: Tensor | None = None) -> Tensor:
    """Shift and scale to mean 0 and variance 1, over all entries or those of a mask.

    The variance is over N, not N - 1. What is not in the mask becomes 0.

    Raises:
        ValueError: if the shapes differ, if a score is not finite, or if all are equal
            or there is none, so that there is nothing to learn from.
    """
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    check_shapes(scores=scores, mask=mask)
    chosen = scores[mask].float()
    if not chosen.isfinite().all():
        n_bad = int((~chosen.isfinite()).sum())
        raise ValueError(
            f"{n_bad} of {len(chosen)} rewards are not finite numbers; "
            "look at what the reward models say of single answers"
        )
    if len(chosen) == 0 or bool((chosen == chosen[0]).all()):
        raise ValueError(
            f"all {len(chosen)} rewards are equal: nothing can be learnt; "
            "look whether the answers differ, and whether the reward depends on them"
        )
    chosen = chosen - chosen.mean()
    white = torch.zeros_like(scores, dtype=torch.float)
    white[mask] = chosen / chosen.square().mean().sqrt()
    return white


ScoreBoth = Callable[[list[Dialog], list[str]], tuple[Tensor, Tensor]]


def model_scores(
    helpfulness: RewardModel, safety: RewardModel, tokenizer: Tokenizer
) -> ScoreBoth:
    """Both reward models, each in one pass over the same batch.

    Whatever a policy writes gets a score, also an empty answer.
    """

    @torch.no_grad()
    def score(prompts: list[Dialog], answers: list[str]) -> tuple[Tensor, Tensor]:
        asked = [encode_dialog(prompt, tokenizer).ids for prompt in prompts]
        rows = [
            ids + tokenizer.encode(f"{answer.strip()} ", eos=True)
            for ids, answer in zip(asked, answers, strict=True)
        ]
        starts = torch.tensor([len(ids) for ids in asked])
        device = helpfulness.head.weight.device
        batch = [x.to(device) for x in (*pad_rows(rows), starts)]
        return helpfulness(*batch)[:, 0], safety(*batch)[:, 0]

    return score


def oracle_scores(oracle: Oracle) -> ScoreBoth:
    """The truth about both, as logits: the best reward models there could be."""

    def score(prompts: list[Dialog], answers: list[str]) -> tuple[Tensor, Tensor]:
        ratings = [
            oracle.rate(prompt[-1]["content"], answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        helpfulness, safety = torch.tensor(ratings).clamp(0.02, 0.98).logit().unbind(1)
        return helpfulness, safety

    return score


def combine(score_both: ScoreBoth, safety_prompts: Collection[str]) -> Score:
    """A single reward from two scores, see `combined_reward`.

    Args:
        score_both: from prompts and answers to helpfulness and safety, both (B,).
        safety_prompts: what users say in the prompts that are tagged.
    """
    tagged = set(safety_prompts)

    def score(prompts: list[Dialog], answers: list[str]) -> Tensor:
        helpfulness, safety = score_both(prompts, answers)
        is_safety = torch.tensor([p[-1]["content"] in tagged for p in prompts])
        return combined_reward(helpfulness, safety, is_safety.to(safety.device))

    return score


class Prompt(NamedTuple):
    """A dialogue that ends with the user, and its tokens."""

    dialog: Dialog
    ids: list[int]


class PromptDataset:
    """Prompts to answer, in a new order in each epoch.

    Args:
        dialogs: each ends with the user.
        tokenizer: of the policy.
        sequence_length: what a prompt and its answer may have together.
        max_new_tokens: of these, kept for the answer.
        seed: of all orders.

    Raises:
        ValueError: if there are none, or one is refused or too long.
    """

    def __init__(
        self,
        dialogs: Sequence[Dialog],
        tokenizer: Tokenizer,
        sequence_length: int,
        max_new_tokens: int,
        seed: int = 0,
    ):
        self.prompts = [
            Prompt(dialog, encode_dialog(dialog, tokenizer).ids) for dialog in dialogs
        ]
        if not self.prompts:
            raise ValueError("there are no prompts")
        for number, (dialog, ids) in enumerate(self.prompts):
            if dialog[-1]["role"] != "user":
                raise ValueError(f"prompt {number} does not end with the user")
            if len(ids) + max_new_tokens > sequence_length:
                raise ValueError(
                    f"prompt {number} has {len(ids)} tokens, which leaves no room for "
                    f"{max_new_tokens} more in a context of {sequence_length}"
                )
        self.tokenizer = tokenizer
        self.sequence_length, self.seed = sequence_length, seed
        self.n_tokens = sum(len(prompt.ids) for prompt in self.prompts)

    def __len__(self) -> int:
        """Prompts in an epoch."""
        return len(self.prompts)

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> list[Prompt]:
        """The prompts of one process at one step, a function of seed and arguments."""
        first = (step * world_size + rank) * batch_size
        places = [divmod(first + i, len(self)) for i in range(batch_size)]
        orders = {
            epoch: np.random.default_rng([self.seed, epoch]).permutation(len(self))
            for epoch in {epoch for epoch, _ in places}
        }
        chosen = [orders[epoch][place] for epoch, place in places]
        return [self.prompts[i] for i in chosen]


class PromptDataModule(LightningDataModule):
    """Prompts to learn from, and others to decide when to stop.

    Args:
        train, held_out: see `PromptDataset`.
        batch_size: prompts of an iteration, over all processes.
    """

    def __init__(self, train: PromptDataset, held_out: PromptDataset, batch_size: int):
        super().__init__()
        self.train, self.held_out, self.batch_size = train, held_out, batch_size

    def train_dataloader(self) -> MixedLengthLoader:
        """Batches of prompts without end."""
        datasets: list[Any] = [self.train]
        share = processes(self.trainer)
        return MixedLengthLoader(datasets, [1.0], [self.batch_size], *share)

    def val_dataloader(self) -> DataLoader[list[Prompt]]:
        """All held-out prompts, in one batch."""
        batches: Any = [self.held_out.prompts]
        return DataLoader(batches, batch_size=None, collate_fn=list)


@dataclass
class Rollout:
    """Answers that the policy wrote, and all that is needed to learn from them.

    Attributes:
        ids: prompt and answer, padded behind, (B, T).
        response_mask: which of them the policy wrote, with the EOS, bool, (B, T).
        logprobs: of these tokens when they were written, (B, T), else 0.
        reference_logprobs: under the policy before PPO, (B, T).
        values: expected sum of rewards from this token on, (B, T).
        rewards: of each token: KL penalty, and at the end what the answer got, (B, T).
        advantages, returns: (B, T).
        scores: of the answers, from the reward function, NaN for cut ones, (B,).
        finished: whether an answer ended with EOS, bool, (B,).
    """

    ids: Tensor
    response_mask: Tensor
    logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    rewards: Tensor
    advantages: Tensor
    returns: Tensor
    scores: Tensor
    finished: Tensor

    def rows(self, chosen: Tensor) -> "Rollout":
        """Some of the answers, without the padding that these do not need."""
        length = int(self.response_mask[chosen].nonzero()[:, 1].max()) + 1
        parts = (getattr(self, field.name)[chosen] for field in fields(self))
        return Rollout(*(p[:, :length] if p.dim() > 1 else p for p in parts))


MOSTLY_FULL = 0.9  # share of tokens in a batch from which on windows save nothing


def hidden_states(model: Llama, ids: Tensor, lengths: Tensor) -> Tensor:
    """Last hidden states of rows, (B, T, C), computed for tokens and not for padding.

    Args:
        ids: padded behind, (B, T).
        lengths: tokens of each row, (B,); hidden states of padding mean nothing.
    """
    if lengths.sum() > MOSTLY_FULL * ids.numel():
        return model(ids, return_hidden=True)
    rows = torch.arange(ids.numel()).view(ids.shape).tolist()
    counts = lengths.tolist()
    examples = [Example(r[:n], [False] * n) for r, n in zip(rows, counts, strict=True)]
    window = 64 * math.ceil(1.5 * max(counts) / 64)  # a long row and a short one
    places, _, samples, _ = collate(pack(examples, window))
    places, samples = places.to(ids.device), samples.to(ids.device)  # (W, N)
    tokens, real = ids.flatten()[places], samples >= 0
    hidden = model(tokens, *separate_samples(samples), return_hidden=True)
    found = hidden.new_zeros(ids.numel(), hidden.shape[-1])
    found[places[real]] = hidden[real]
    return found.view(*ids.shape, -1)


def lengths_of(mask: Tensor) -> Tensor:
    """How many tokens rows have up to the ends of their answers, (B,).

    Args:
        mask: the tokens of the answers, bool, (B, T).
    """
    return mask.shape[1] - mask.flip(1).int().argmax(1)


def answer_logprobs(model: Llama, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each token of the answers, (B, T); 0 for other tokens.

    Args:
        ids: padded behind, (B, T).
        mask: the tokens of the answers, bool, (B, T); never the first of a row.
    """
    hidden = hidden_states(model, ids[:, :-1], lengths_of(mask) - 1)
    return token_logprobs(hidden, model.output.weight, ids, mask)


class ValueModel(RewardModel):
    """A reward model that is asked after each token and not only after the last."""

    def forward(  # type: ignore[override]
        self, tokens: Tensor, lengths: Tensor
    ) -> Tensor:
        """Values after each token, (B, T); see `hidden_states`."""
        hidden = hidden_states(self.llama, tokens, lengths)
        # a sum of one number: FSDP's hooks take no view, which [..., 0] would be
        return self.head(hidden).float().sum(-1)


def values_before(values_after: Tensor, mask: Tensor) -> Tensor:
    """From values after tokens to values before them, 0 outside of the mask, (B, T)."""
    return F.pad(values_after[:, :-1], (1, 0)).masked_fill(~mask, 0)


@torch.no_grad()
def rollout_copy(model: Llama, dtype: torch.dtype = torch.float32) -> Llama:
    """A whole copy of a model to sample from, also of one divided among processes."""
    with torch.device("meta"):
        copy = Llama(model.config)
    for name, weight in model.named_parameters(remove_duplicate=False):
        owner = copy.get_submodule(name.rpartition(".")[0])
        owner.weight = nn.Parameter(whole(weight.to(dtype)), requires_grad=False)
    copy.cos, copy.sin = model.cos, model.sin
    return for_decoding(copy)


@dataclass(frozen=True)
class PPOSettings:
    """The numbers of PPO, with the paper's where it gives them (§3.2.3).

    Attributes:
        minibatch_size: answers of one gradient step.
        clip: of ratios and values.
        kl_weight: beta, of the KL penalty. The paper's is 0.01 or 0.005.
        gamma, lam: see `generalized_advantages` (ours).
        critic: whether to learn values; without, an answer's return is compared with
            the average of its batch, and ``lam`` is 1.
        cut_penalty: what an answer without an end costs, in standard deviations of the
            scores (ours).
        max_new_tokens: longest answer.
        lr: constant. The paper's is 1e-6.
        critic_lr: of the value model (ours).
        weight_decay, clip_norm: as in pretraining.
    """

    minibatch_size: int = 64
    clip: float = 0.2
    kl_weight: float = 0.05
    gamma: float = 1.0
    lam: float = 0.95
    critic: bool = True
    cut_penalty: float = 1.0
    max_new_tokens: int = 64
    lr: float = 1e-4
    critic_lr: float = 1e-4
    weight_decay: float = 0.1
    clip_norm: float = 1.0


class PPOModule(LightningModule):
    """A chat model that learns from rewards for its own answers.

    One step of the trainer is one iteration: a batch of prompts is answered, scored,
    and learnt from, in as many gradient steps as it has minibatches.

    Args:
        folder: of the chat model to start from, which stays the reference of the KL
            penalty and is opened again when a run continues.
        reward: scores answers, from prompts and answers to (B,).
        settings: see `PPOSettings`.
        seed: of the answers and of the order of the minibatches.
        lay_out: makes each model where it should live, as in `PretrainingModule`.

    Raises:
        FileNotFoundError: if there is no model in the folder.
    """

    model: Llama
    critic: ValueModel

    def __init__(
        self,
        folder: str | Path,
        reward: Score,
        settings: PPOSettings | None = None,
        seed: int = 0,
        lay_out: LayOut[Any] = on_one_device,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.folder, self.reward, self.seed = Path(folder), reward, seed
        self.settings, self.lay_out = settings or PPOSettings(), lay_out
        if not (path := self.folder / "config.json").is_file():
            raise FileNotFoundError(f"{folder} holds no model: no config.json in it")
        self.config = read_config(path)
        self.answers: list[str] = []
        self.rank, self.n_processes, self.firsts = 0, 1, [0]

    def configure_model(self) -> None:
        """Open the policy, the reference and the value model."""
        if hasattr(self, "model"):
            return
        self.tokenizer = Tokenizer(self.folder / "tokenizer.model")
        config = self.config

        def policy() -> Llama:
            return self.lay_out(
                lambda: Llama(config), lambda model: model.load_weights(self.folder)
            )

        self.model, reference = policy(), policy()
        # in a tuple, it does not get into checkpoints
        self.frozen = (reference.requires_grad_(False),)
        if self.settings.critic:
            self.critic = self.lay_out(
                lambda: ValueModel(RewardConfig(**vars(config))),
                lambda model: model.load_chat(self.folder),
            )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer for both models, each with its learning rate."""
        settings = self.settings
        decay = settings.weight_decay
        optimizer = configure_optimizer(self.model, settings.lr, decay)
        if settings.critic:
            other = configure_optimizer(self.critic, settings.critic_lr, decay)
            for group in other.param_groups:
                optimizer.add_param_group(group)
        return optimizer

    def on_fit_start(self) -> None:
        """Put the reference where the policy is, and find the other processes."""
        self.frozen[0].to(self.device)
        self.rank, self.n_processes = processes(self.trainer)
        # those that share a model (chapter 10) see the same data: one of them counts
        ranks = self.all_gather(torch.tensor(self.rank, device=self.device))
        every = ranks.flatten().tolist()
        self.firsts = [every.index(rank) for rank in range(self.n_processes)]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in the order of the batch."""
        if self.n_processes == 1:
            return rows
        return self.all_gather(rows)[self.firsts].flatten(0, 1)

    @contextmanager
    def sampler(self) -> Iterator[Llama]:
        """The policy to sample from: a copy, on a GPU in the type of its products."""
        device, dtype = self.device.type, torch.float32
        # on a CPU, where bf16 makes single tokens no faster, they stay exact
        if device == "cuda" and torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        yield rollout_copy(self.model, dtype)

    def sample(
        self, prompts: list[Prompt], seed: int, rows: Sequence[int] | None = None
    ) -> tuple[list[list[int]], list[str], Tensor]:
        """Answers to prompts: ids, texts, and whether they ended, (B,).

        Args:
            rows: which prompts of the whole batch these are, see `generate`.
        """
        no_autocast = torch.autocast(self.device.type, enabled=False)
        with self.sampler() as policy, no_autocast:
            drawn = generate(
                policy,
                [prompt.ids for prompt in prompts],
                max_new_tokens=self.settings.max_new_tokens,
                stop_ids=[self.tokenizer.eos_id],
                seed=seed,
                rows=rows,
            )
        texts = [self.tokenizer.decode(ids).strip() for ids in drawn.ids]
        return drawn.ids, texts, torch.tensor(drawn.finished, device=self.device)

    def score(self, prompts: list[Prompt], finished: Tensor) -> Tensor:
        """Scores of the answers, NaN for those that did not end, (B,)."""
        # reward models that are divided among processes need all of them, so that one
        # whose answers were all cut asks about an empty one
        asked = finished.nonzero()[:, 0].tolist() or [0]
        texts = [self.answers[i] if finished[i] else "" for i in asked]
        scores = torch.full(finished.shape, math.nan, device=self.device)
        scored = self.reward([prompts[i].dialog for i in asked], texts)
        scores[asked] = scored.to(scores)
        return scores.masked_fill(~finished, math.nan)

    @torch.no_grad()
    def collect(self, prompts: list[Prompt], seed: int) -> Rollout:
        """Answer prompts, score the answers, and compute what learning needs.

        Each process answers its own prompts; what is returned has the answers of all.

        Raises:
            ValueError: if fewer than two answers ended, or if rewards are not finite
                or all equal.
        """
        first = self.rank * len(prompts)
        numbers = range(first, first + len(prompts))
        answers, self.answers, finished = self.sample(prompts, seed, numbers)
        rows = [prompt.ids + ids for prompt, ids in zip(prompts, answers, strict=True)]
        ids, lengths = (x.to(self.device) for x in pad_rows(rows))
        width = int(self.gather(lengths).max())
        ids = F.pad(ids, (0, width - ids.shape[1]))  # (B, T), T the same everywhere
        starts = torch.tensor([len(p.ids) for p in prompts], device=self.device)
        places = torch.arange(width, device=self.device)
        mask = (places >= starts[:, None]) & (places < lengths[:, None])  # (B, T)
        parts = (
            ids,
            mask,
            answer_logprobs(self.model, ids, mask),
            answer_logprobs(self.frozen[0], ids, mask),
            self.critic(ids, lengths)
            if self.settings.critic
            else torch.zeros_like(ids).float(),
            self.score(prompts, finished),
            finished,
        )
        return self.judge(*map(self.gather, parts))

    def judge(
        self,
        ids: Tensor,
        mask: Tensor,
        logprobs: Tensor,
        reference: Tensor,
        after: Tensor,
        scores: Tensor,
        finished: Tensor,
    ) -> Rollout:
        """Rewards and advantages of all answers, see `Rollout` and `collect`.

        Args:
            after: values after each token, (B, T).
        """
        settings = self.settings
        if (n_ended := int(finished.sum())) < 2:
            raise ValueError(
                f"{n_ended} of {len(ids)} answers ended within "
                f"{settings.max_new_tokens} tokens, and learning compares at least "
                "two; allow more tokens, or ask more prompts"
            )
        final = whiten(scores, finished) - settings.cut_penalty * (~finished)
        rewards = -settings.kl_weight * (logprobs - reference)
        last = torch.arange(len(ids), device=ids.device), lengths_of(mask) - 1
        rewards[last] += final
        values = values_before(after, mask)
        advantages, returns = generalized_advantages(
            rewards,
            values,
            mask,
            gamma=settings.gamma,
            lam=settings.lam if settings.critic else 1.0,
            bootstrap=after[last].masked_fill(finished, 0),
        )
        return Rollout(
            ids,
            mask,
            logprobs,
            reference,
            values,
            rewards,
            advantages,
            returns,
            scores,
            finished,
        )

    def losses(self, part: Rollout) -> tuple[Tensor, Tensor]:
        """Policy loss and value loss of a minibatch."""
        clip, mask = self.settings.clip, part.response_mask
        logprobs = answer_logprobs(self.model, part.ids, mask)
        loss = policy_loss(logprobs, part.logprobs, part.advantages, mask, clip)
        if not self.settings.critic:
            return loss, torch.zeros_like(loss)
        after = self.critic(part.ids, lengths_of(mask))
        values = values_before(after, mask)
        return loss, value_loss(values, part.values, part.returns, mask, clip)

    def training_step(self, prompts: list[Prompt], batch_idx: int) -> None:
        """One iteration.

        Raises:
            ValueError: if the batch is no multiple of a minibatch, or the processes
                cannot share one; see `collect`.
            FloatingPointError: if a loss or a gradient is not finite.
        """
        size, iteration = self.settings.minibatch_size, self.global_step
        n_rows = len(prompts) * self.n_processes
        if n_rows % size or size % self.n_processes:
            raise ValueError(
                f"a batch of {n_rows} prompts, minibatches of {size} and "
                f"{self.n_processes} processes: each has to be a multiple of the next"
            )
        rollout = self.collect(prompts, self.seed * 1_000_003 + iteration)
        random = np.random.default_rng([self.seed, iteration])
        order = torch.from_numpy(random.permutation(n_rows)).to(self.device)
        optimizer = self.optimizers()
        figures = []
        parts = order.split(size)
        for number, chosen in enumerate(parts, start=1):
            optimizer.zero_grad()
            losses = self.share_of_losses(rollout, chosen)
            self.manual_backward(sum(losses))
            norms = [self.clip_gradient(model) for model in self.children()]
            found = torch.stack([*losses, *norms]).detach()
            figures.append(self.trainer.strategy.reduce(found, reduce_op="mean"))
            if not figures[-1].isfinite().all():
                raise FloatingPointError(
                    f"in iteration {iteration} a loss or its gradient is not a finite "
                    "number; the last checkpoint is from before. Try a lower lr"
                )
            # Lightning counts the steps that it takes: one for each iteration
            (optimizer if number == len(parts) else optimizer.optimizer).step()
        self.log_iteration(rollout, torch.stack(figures).mean(0))

    def share_of_losses(self, rollout: Rollout, chosen: Tensor) -> list[Tensor]:
        """Losses of this process's part of a minibatch.

        Their mean over the processes is the loss of the minibatch, in which each token
        counts alike.
        """
        mine = chosen[self.rank :: self.n_processes]
        n_mine, n_all = (rollout.response_mask[rows].sum() for rows in (mine, chosen))
        weight = n_mine * self.n_processes / n_all
        return [loss * weight for loss in self.losses(rollout.rows(mine))]

    def clip_gradient(self, model: nn.Module) -> Tensor:
        """Scale a long gradient down; returns how long it was."""
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.settings.clip_norm)
        return whole(norm)

    def log_iteration(self, rollout: Rollout, figures: Tensor) -> None:
        """Log what there is to watch."""
        mask = rollout.response_mask
        divergence = (rollout.logprobs - rollout.reference_logprobs).sum(1).mean()
        logged = {
            "reward": rollout.scores.nanmean(),
            "kl": divergence,
            "entropy": -rollout.logprobs[mask].mean(),
            "answer_tokens": mask.sum(1).float().mean(),
            "finished": rollout.finished.float().mean(),
        }
        names = ("loss", "value_loss", "gradient_norm", "value_gradient_norm")
        logged |= dict(zip(names, figures, strict=False))
        self.log_dict(logged)

    def validation_step(self, prompts: list[Prompt], batch_idx: int) -> None:
        """Log the mean reward of answers to held-out prompts, which stay the same.

        ``validation_loss`` is its negative, for what keeps the model with the lowest.

        Raises:
            ValueError: if there are fewer prompts than processes.
        """
        numbers = range(self.rank, len(prompts), self.n_processes)
        mine = [prompts[i] for i in numbers]
        if len(prompts) < self.n_processes:
            raise ValueError(
                f"{self.n_processes} processes cannot share {len(prompts)} prompts; "
                "hold out more, or use fewer processes"
            )
        _, texts, _ = self.sample(mine, self.seed, numbers)
        rewards = self.reward([prompt.dialog for prompt in mine], texts).double()
        sums = torch.stack([rewards.sum(), rewards.new_tensor(len(mine))])
        total, count = self.gather(sums[None].to(self.device)).sum(0)
        reward = (total / count).float()
        values = {"validation_reward": reward, "validation_loss": -reward}
        self.log_dict(values, batch_size=len(prompts))

    def transfer_batch_to_device(
        self, batch: list[Prompt], device: torch.device, dataloader_idx: int
    ) -> list[Prompt]:
        """Prompts stay where they are."""
        return batch
