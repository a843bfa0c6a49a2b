"""Reward models.

Exported from book/13_reward.md, which explains every part. Edit it there,
then `make export`.
"""

import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from lightning import LightningDataModule
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llama2_lite.chat import Dialog, Example, answer, encode_dialog, weigh_part
from llama2_lite.model import (
    WEIGHTS,
    Llama,
    LlamaConfig,
    move_into_place,
    read_config,
    read_hugging_face,
    read_json,
    write_json,
)
from llama2_lite.pretraining import (
    LayOut,
    PretrainingModule,
    on_one_device,
    processes,
    whole,
)
from llama2_lite.sft import DialogDataModule
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import (
    LEVELS,
    SAFETY_BINS,
    Annotators,
    Preference,
    Task,
    Town,
    choose_named,
)


def draw_tasks(
    town: Town, n: int, kinds: Sequence[str], seed: int = 0, split: str = "train"
) -> list[Task]:
    """Draw requests: a kind first, evenly among ``kinds``, then one of that kind.

    A kind that is listed twice comes twice as often.
    """
    random = Random(f"requests {seed} {split}")
    known = {kind: town.tasks(split, [kind]) for kind in kinds}
    return [random.choice(known[random.choice(list(kinds))]) for _ in range(n)]


def collect_preferences(
    models: Sequence[Llama],
    tokenizer: Tokenizer,
    tasks: Sequence[Task],
    annotators: Annotators,
    *,
    axis: str = "helpfulness",
    temperatures: Sequence[float] = (0.7, 1.0, 1.3),
    references: bool = False,
    max_new_tokens: int = 64,
    seed: int = 0,
) -> list[Preference]:
    """Let annotators compare two answers of models to each request.

    Each answer comes from one of the models at one of the temperatures, drawn evenly.
    Left out are pairs of equal answers and empty answers, and, where the axis is
    safety, pairs whose chosen answer alone is unsafe. Source: paper §3.2.1.

    Args:
        models: variants to draw answers from.
        tasks: one comparison for each.
        axis: what annotators look at, "helpfulness" or "safety".
        references: compare the written answer to each request with both answers too
            (our addition: three comparisons for two answers).
        max_new_tokens: longest answer.
        seed: of the answers.
    """
    random = Random(f"preferences {seed}")
    ways = [(model, t) for model in range(len(models)) for t in temperatures]
    drawn = [(random.choice(ways), i) for i in range(len(tasks)) for _ in range(2)]
    answers: list[list[str]] = [[] for _ in tasks]
    for number, way in enumerate(ways):
        asked = [i for other, i in drawn if other == way]
        texts = answer(
            models[way[0]],
            tokenizer,
            [tasks[i].dialog() for i in asked],
            max_new_tokens=max_new_tokens,
            temperature=way[1],
            seed=seed * len(ways) + number,
        )
        for i, text in zip(asked, texts, strict=True):
            answers[i].append(text)
    found = []
    for task, sampled in zip(tasks, answers, strict=True):
        texts = [*sampled, task.reference] if references else sampled
        for first, second in combinations(texts, 2):
            if first != second and first and second:
                found.append(annotators.compare(task, first, second, axis))
    return [preference for preference in found if preference is not None]


def written_preferences(
    town: Town,
    tasks: Sequence[Task],
    annotators: Annotators,
    *,
    axis: str = "helpfulness",
    flaws: Sequence[str] = ("wrong", "off_topic", "rude", "evasive", "terse"),
    seed: int = 0,
) -> list[Preference]:
    """Let annotators compare a good answer with a flawed one, both written.

    They stand for open-source data: answers of other writers and other models.

    Args:
        tasks: one comparison for each.
        axis: what annotators look at.
        flaws: one is drawn for each request, see `Town.bad_answer`.
        seed: of the flaws and of the wordings.
    """
    random = Random(f"written {seed}")
    found = []
    for task in tasks:
        bad = town.bad_answer(task, random.choice(list(flaws)), random)
        if bad != task.reference:
            found.append(annotators.compare(task, task.reference, bad, axis))
    return [preference for preference in found if preference is not None]


def mix_pairs(
    own: Sequence[Preference], others: Sequence[Preference], share: float, seed: int = 0
) -> list[Preference]:
    """All of a model's own pairs, and as many others that ``share`` are its own.

    Others are drawn evenly, without repetition; if there are too few, all are taken.
    Source: paper §3.2.2, where the share is 0.5 for helpfulness and 0.9 for safety.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, but is {share}")
    wanted = round(len(own) * (1 - share) / share)
    random = Random(f"mix {seed}")
    return [*own, *random.sample(list(others), min(wanted, len(others)))]


MARGINS = {
    name: dict(zip(LEVELS, margins, strict=True))
    for name, margins in {
        "none": (0.0, 0.0, 0.0, 0.0),
        "small": (1.0, 2 / 3, 1 / 3, 0.0),
        "large": (3.0, 2.0, 1.0, 0.0),
    }.items()
}  # paper, Table 27


def ranking_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin).

    Args:
        chosen, rejected: raw scores of the two answers, (B,).
        margin: how far apart they should be, (B,).

    Returns:
        A scalar, fp32.

    Raises:
        ValueError: if the shapes differ; (B, 1) with (B,) would compare all with all.
    """
    shapes = [tuple(x.shape) for x in (chosen, rejected, margin)]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1:
        raise ValueError(
            "chosen, rejected and margin must all have the shape (B,), but have "
            f"{', '.join(map(str, shapes))}"
        )
    return -F.logsigmoid(chosen.float() - rejected.float() - margin).mean()


UNKNOWN = -1


def safety_loss(scores: Tensor, is_safe: Tensor) -> Tensor:
    """Mean of -log sigmoid(score) for safe answers and -log sigmoid(-score) for others.

    Binary cross-entropy: our choice, since the paper names an auxiliary safety loss
    and gives no formula (Table 29).

    Args:
        scores: raw, (N,).
        is_safe: 1 for safe, 0 for unsafe, -1 where nobody was asked, (N,); the last
            do not count.

    Returns:
        A scalar, fp32; 0 if nobody was asked about any.

    Raises:
        ValueError: if the shapes differ.
    """
    if scores.dim() != 1 or scores.shape != is_safe.shape:
        raise ValueError(
            "scores and is_safe must both have the shape (N,), but have "
            f"{tuple(scores.shape)} and {tuple(is_safe.shape)}"
        )
    known = is_safe != UNKNOWN
    losses = F.binary_cross_entropy_with_logits(
        scores.float(), is_safe.clamp(min=0).float(), reduction="none"
    )
    return (losses * known).sum() / known.sum().clamp(min=1)


@dataclass(frozen=True)
class RewardConfig(LlamaConfig):
    """The sizes of a reward model, and what counts in its score.

    Attributes:
        likelihood_weight: of the log-probability of an answer's least likely token
            (ours); 0 as in the paper.
    """

    likelihood_weight: float = 0.0

    def __post_init__(self) -> None:
        self.llama()  # checks the sizes
        if not self.likelihood_weight >= 0:
            weight = self.likelihood_weight
            raise ValueError(f"likelihood_weight must not be negative, but is {weight}")

    def llama(self) -> LlamaConfig:
        """The sizes alone."""
        sizes = dict(vars(self))
        del sizes["likelihood_weight"]
        return LlamaConfig(**sizes)

    @classmethod
    def read(
        cls, folder: str | Path, likelihood_weight: float | None = None
    ) -> "RewardConfig":
        """That of the model in a folder, of a reward model or a chat model.

        Args:
            likelihood_weight: takes the place of what the folder says.

        Raises:
            FileNotFoundError, ValueError: if there is none, or not of a Llama.
        """
        path = Path(folder) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not a model: it has no config.json")
        if likelihood_weight is None:
            likelihood_weight = float(read_json(path).get("likelihood_weight", 0.0))
        return cls(**vars(read_config(path)), likelihood_weight=likelihood_weight)


def token_logprobs(hidden: Tensor, weight: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each token in a mask, (B, T); 0 for other tokens.

    Args:
        hidden: last hidden states, (B, T, C) or, without the last, (B, T - 1, C).
        weight: of the output layer, (V, C), whole or divided among processes.
        ids: (B, T).
        mask: bool, (B, T); never the first token of a row.
    """
    before = hidden[:, : ids.shape[1] - 1][mask[:, 1:]]  # (N, C)
    logits = F.linear(before, whole(weight)).float()  # (N, V)
    found = -F.cross_entropy(logits, ids[mask], reduction="none")
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, found)


class RewardModel(nn.Module):
    """A chat model that gives one number instead of a token.

    A row takes the place of its output matrix and reads the last token. The number is
    raw: its sigmoid is what the paper calls the score. Source: paper §3.2.2, but for
    the likelihood.

    Args:
        config: without a weight for the likelihood, the output matrix is not used: it
            is tied to the embedding and so takes no room.
    """

    def __init__(self, config: RewardConfig):
        super().__init__()
        if not config.likelihood_weight:
            config = replace(config, tie_embeddings=True)
        self.config = config
        self.llama = Llama(config.llama())
        self.head = nn.Linear(config.dim, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, tokens: Tensor, lengths: Tensor, starts: Tensor) -> Tensor:
        """Raw scores, and mean log-probabilities of the answers' tokens, (B, 2).

        The latter are 0 if the likelihood has no weight in the scores.

        Args:
            tokens: ids of dialogues, (B, T), padded behind with anything.
            lengths: of the dialogues, (B,).
            starts: where the answers begin, (B,).
        """
        hidden = self.llama(tokens, return_hidden=True)  # (B, T, C)
        rows = torch.arange(len(tokens), device=tokens.device)
        scores = self.head(hidden[rows, lengths - 1])[:, 0].float()
        if not (weight := self.config.likelihood_weight):
            return torch.stack([scores, torch.zeros_like(scores)], 1)
        place = torch.arange(tokens.shape[1], device=tokens.device)
        mask = (place >= starts[:, None]) & (place < lengths[:, None])
        found = token_logprobs(hidden, self.llama.output.weight, tokens, mask)
        least = found.detach().amin(1)  # judges, and is not to be bent by the ranking
        return torch.stack([scores + weight * least, found.sum(1) / mask.sum(1)], 1)

    def score_rows(
        self, tokens: Tensor, lengths: Tensor, starts: Tensor, pieces: int = 4
    ) -> Tensor:
        """What `forward` gives, with rows of like length computed together.

        Each piece of the batch is only as wide as its own longest row.
        """
        order = lengths.argsort()
        parts = [
            self(tokens[rows, : int(lengths[rows].max())], lengths[rows], starts[rows])
            for rows in order.chunk(pieces)
        ]
        return torch.cat(parts)[order.argsort()]

    @torch.no_grad()
    def score(
        self, tokenizer: Tokenizer, dialogs: Sequence[Dialog], batch_size: int = 256
    ) -> Tensor:
        """Raw scores of dialogues that end with the assistant, (N,), on the CPU.

        Raises:
            ValueError: if a dialogue is refused, ends otherwise, or is too long.
        """
        limit = self.config.max_seq_len
        rows = [
            encode_answered(dialog, tokenizer, limit, f"dialogue {i}")
            for i, dialog in enumerate(dialogs)
        ]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
        scores = torch.empty(len(rows))
        device = self.head.weight.device
        for start in range(0, len(order), batch_size):
            some = order[start : start + batch_size]
            tokens, lengths = pad_rows([rows[i].ids for i in some])
            starts = torch.tensor([rows[i].loss_mask.index(True) for i in some])
            batch = (x.to(device) for x in (tokens, lengths, starts))
            scores[some] = self(*batch)[:, 0].cpu()
        return scores

    @classmethod
    def from_chat(
        cls, folder: str | Path, likelihood_weight: float = 0.0
    ) -> "RewardModel":
        """Start from a chat model, with all the weights that are used.

        The head starts at zero (our choice).

        Raises:
            FileNotFoundError, ValueError: see `Llama.from_pretrained`.
        """
        config = RewardConfig.read(folder, likelihood_weight)
        return on_one_device(lambda: cls(config), lambda model: model.load_chat(folder))

    @torch.no_grad()
    def load_chat(self, folder: str | Path) -> None:
        """Fill all weights as in `from_chat`."""
        unused = [] if self.config.likelihood_weight else ["lm_head.weight"]
        self.llama.load_weights(folder, ignore=unused)
        self.head.weight.zero_()

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "RewardModel":
        """Open what `save_pretrained` wrote.

        Raises:
            FileNotFoundError: if the folder or a file of it is missing.
            ValueError: if it holds another kind of model.
        """
        config = RewardConfig.read(folder)
        opened = on_one_device(
            lambda: cls(config), lambda model: model.load_weights(folder)
        )
        return opened.eval()

    @torch.no_grad()
    def load_weights(self, folder: str | Path) -> None:
        """Fill all weights as in `from_pretrained`."""
        _, (tensors,) = read_hugging_face(Path(folder))
        if HEAD not in tensors:
            raise ValueError(f"{folder}: tensor {HEAD} is missing")
        head = self.head.weight
        head.copy_(tensors[HEAD].view(head.shape).to(head.device))
        self.llama.load_weights(folder, ignore=[HEAD])

    def save_pretrained(
        self,
        folder: str | Path,
        tokenizer: Tokenizer | None = None,
        force: bool = False,
    ) -> None:
        """Write a folder that transformers opens as LlamaForSequenceClassification.

        It knows the row alone: a likelihood does not count in its scores.

        Raises:
            FileExistsError: if the folder exists and ``force`` is not given.
        """
        folder = Path(folder)
        if folder.exists() and not force:
            raise FileExistsError(
                f"{folder} exists; choose another folder, or give force=True to "
                "replace it"
            )
        beside = folder.with_name(f".{folder.name}.{os.getpid()}.reward")
        try:
            self.llama.save_pretrained(beside, tokenizer)
            weight = self.config.likelihood_weight
            add_head(beside, self.head.weight.detach().cpu(), weight)
            move_into_place(beside, folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


HEAD = "score.weight"  # as transformers calls it


def add_head(folder: Path, weight: Tensor, likelihood_weight: float) -> None:
    """Make the folder of a Llama that of a classifier with one output."""
    path = max(folder.glob("*.safetensors"))
    tensors = load_file(path) | {HEAD: weight.contiguous()}
    save_file(tensors, path, metadata={"format": "pt"})
    if (index := folder / f"{WEIGHTS}.index.json").is_file():
        content = read_json(index)
        content["weight_map"][HEAD] = path.name
        content["metadata"]["total_size"] += weight.nbytes
        write_json(index, content)
    config = read_json(folder / "config.json")
    config |= {"architectures": ["LlamaForSequenceClassification"], "pad_token_id": 0}
    config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}}
    if likelihood_weight:
        config["likelihood_weight"] = likelihood_weight
    write_json(folder / "config.json", config)


def encode_answered(
    dialog: Dialog, tokenizer: Tokenizer, limit: int, name: str
) -> Example:
    """A dialogue that ends with the assistant, at most ``limit`` tokens of it.

    Raises:
        ValueError: if it is refused, ends otherwise, or is too long; with its name.
    """
    try:
        example = encode_dialog(dialog, tokenizer, train_on="last")
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if dialog[-1]["role"] != "assistant":
        raise ValueError(f"{name} does not end with an answer, so none can be scored")
    if (n := len(example.ids)) > limit:
        raise ValueError(f"{name} has {n} tokens, but {limit} are the limit")
    return example


def pad_rows(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Tokens (B, T), padded behind with 0, and lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
    for number, row in enumerate(rows):
        tokens[number, : len(row)] = row
    return torch.from_numpy(tokens), lengths


def answered(prompt: Sequence[Any], text: str) -> Dialog:
    """A prompt with an answer to it."""
    return [*prompt, {"role": "assistant", "content": text}]


class PairBatch(NamedTuple):
    """B pairs as 2B rows: the chosen answers, then the rejected ones.

    Attributes:
        tokens: prompts with answers, (2B, T), padded behind.
        lengths: (2B,).
        starts: where the answers begin, (2B,).
        margins: (B,).
        is_safe: 1, 0 or -1 for unknown, (2B,).
        weight: of the safety loss of this part of a step's batch, see
            `llama2_lite.chat.weigh_part`.
    """

    tokens: Tensor
    lengths: Tensor
    starts: Tensor
    margins: Tensor
    is_safe: Tensor
    weight: float = 1.0


class PreferenceDataset:
    """Pairs as tokens, in a new order in each epoch.

    Args:
        pairs: what annotators preferred; without a level the margin is 0, without a
            safety bin the safety is unknown.
        tokenizer: of the chat model.
        sequence_length: of a prompt with its answer, at most; longer ones are refused.
        margins: which of `MARGINS`.
        seed: of the orders.

    Attributes:
        n_tokens: of all pairs together.

    Raises:
        ValueError: if there are no pairs, or one is refused or has two equal answers.
    """

    def __init__(
        self,
        pairs: Sequence[Preference],
        tokenizer: Tokenizer,
        sequence_length: int,
        *,
        margins: str = "none",
        seed: int = 0,
    ):
        if not pairs:
            raise ValueError("there are no pairs to learn from")
        self.sequence_length = sequence_length
        self.seed = seed
        self._orders: dict[int, list[int]] = {}
        by_level = {None: 0.0, **choose_named(margins, "margin", MARGINS)}
        self.margins = [by_level[pair.level] for pair in pairs]
        self.is_safe = [safety_of_pair(pair) for pair in pairs]
        self.rows: list[list[list[int]]] = []
        self.starts: list[int] = []  # of the answers, the same for both
        for number, pair in enumerate(pairs):
            if pair.chosen.strip() == pair.rejected.strip():
                raise ValueError(f"pair {number}: both answers are the same")
            examples = [
                encode_answered(dialog, tokenizer, sequence_length, f"pair {number}")
                for dialog in dialogs_of(pair)
            ]
            self.rows.append([example.ids for example in examples])
            self.starts.append(examples[0].loss_mask.index(True))
        self.n_tokens = sum(len(row) for pair in self.rows for row in pair)

    def __len__(self) -> int:
        """Pairs in an epoch."""
        return len(self.rows)

    def pairs(self, numbers: Sequence[int]) -> PairBatch:
        """Some of the pairs, by their numbers, as a batch."""
        sides = [(i, side) for side in (0, 1) for i in numbers]
        return PairBatch(
            *pad_rows([self.rows[i][side] for i, side in sides]),
            starts=torch.tensor([self.starts[i] for i, _ in sides]),
            margins=torch.tensor([self.margins[i] for i in numbers]),
            is_safe=torch.tensor([self.is_safe[i][side] for i, side in sides]),
        )

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> PairBatch:
        """The pairs of one process, or of one part of a step, at one step.

        What a step sees in all processes together depends on the product of their
        number and ``batch_size`` only.
        """
        size = batch_size * world_size
        places = (divmod(step * size + i, len(self)) for i in range(size))
        numbers = [self._order(epoch)[place] for epoch, place in places]
        rated = [sum(x != UNKNOWN for x in self.is_safe[i]) for i in numbers]
        mine = numbers[rank * batch_size : (rank + 1) * batch_size]
        return self.pairs(mine)._replace(weight=weigh_part(rated, rank, world_size))

    def _order(self, epoch: int) -> list[int]:
        if epoch not in self._orders:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self))
            self._orders = {epoch: order.tolist()}
        return self._orders[epoch]


def dialogs_of(pair: Preference) -> tuple[Dialog, Dialog]:
    """The prompt with the chosen and with the rejected answer."""
    return answered(pair.prompt, pair.chosen), answered(pair.prompt, pair.rejected)


def safety_of_pair(pair: Preference) -> tuple[int, int]:
    """Whether chosen and rejected answer are safe: 1, 0, or -1 if nobody was asked."""
    if pair.safety_bin is None:
        return UNKNOWN, UNKNOWN
    known = dict(zip(SAFETY_BINS, ((1, 0), (1, 1), (0, 0)), strict=True))
    return choose_named(pair.safety_bin, "safety bin", known)


class PreferenceDataModule(DialogDataModule):
    """Pairs to train on and pairs held out.

    Args:
        train, validation: pairs as tokens.
        batch_size: pairs of a step over all processes.
    """

    dataset: PreferenceDataset  # type: ignore[assignment]
    held_out: PreferenceDataset  # type: ignore[assignment]

    def __init__(
        self, train: PreferenceDataset, validation: PreferenceDataset, batch_size: int
    ):
        LightningDataModule.__init__(self)  # nothing here has to be packed
        self.dataset = train
        self.held_out = validation
        self.batch_size = batch_size

    def val_dataloader(self) -> DataLoader[PairBatch]:  # type: ignore[override]
        """The pairs held out, in order, as many in each process."""
        rank, world_size = processes(self.trainer)
        n_pairs = len(self.held_out) // world_size * world_size
        numbers = range(rank, n_pairs, world_size)
        starts = range(0, len(numbers), self.batch_size)
        batches: Any = [
            self.held_out.pairs(numbers[i : i + self.batch_size]) for i in starts
        ]
        return DataLoader(batches, batch_size=None)


class RewardModule(PretrainingModule):
    """A reward model that learns from pairs.

    The loss is the chapter's equation for it, see `ranking_loss` and `safety_loss`.
    Logs what `PretrainingModule` logs, and ``accuracy`` in validation: the share of
    pairs whose chosen answer has the higher score. The warm-up is 3% of the steps and
    at least 5 (paper §3.2.2).

    Args:
        chat: folder of the chat model to start from.
        peak_lr: the highest learning rate.
        safety_weight: of the auxiliary `safety_loss`.
        likelihood_weight: see `RewardConfig`.
        next_token_weight: of the next-token loss of the chosen answers, which keeps
            the likelihood true.
        weight_decay, clip_norm, lay_out: see `PretrainingModule`.

    Raises:
        FileNotFoundError: if there is no chat model in the folder.
        ValueError: if a next-token loss is asked of a model that gives no likelihoods.
    """

    model: RewardModel  # type: ignore[assignment]

    def __init__(
        self,
        chat: str | Path,
        peak_lr: float = 1e-5,
        safety_weight: float = 0.0,
        likelihood_weight: float = 0.0,
        next_token_weight: float = 0.0,
        weight_decay: float = 0.1,
        clip_norm: float = 1.0,
        lay_out: LayOut[Any] = on_one_device,
    ):
        if next_token_weight and not likelihood_weight:
            raise ValueError(
                "next_token_weight needs a likelihood_weight: without one the model "
                "has no output matrix"
            )
        super().__init__(
            RewardConfig.read(chat, likelihood_weight),
            peak_lr=peak_lr,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            lay_out=lay_out,
        )
        self.chat = Path(chat)
        self.safety_weight = safety_weight
        self.next_token_weight = next_token_weight

    def build(self) -> RewardModel:  # type: ignore[override]
        """The chat model with one output."""
        return RewardModel(self.config)  # type: ignore[arg-type]

    def fill(self, model: RewardModel) -> None:  # type: ignore[override]
        """The weights of the chat model."""
        model.load_chat(self.chat)

    def on_train_start(self) -> None:
        """Fix the warm-up, which depends on the number of steps."""
        super().on_train_start()
        self.warmup = max(5, math.ceil(0.03 * self.trainer.max_steps))

    def loss(self, batch: PairBatch) -> Tensor:  # type: ignore[override]
        """Ranking loss, and the other two with their weights."""
        return self._losses(batch)[0]

    def _losses(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The loss, and which pairs are ranked as annotators did, (B,)."""
        read = self.model.score_rows(batch.tokens, batch.lengths, batch.starts)
        scores, logprobs = read.unbind(1)  # (2B,) each
        chosen, rejected = scores.chunk(2)
        loss = ranking_loss(chosen, rejected, batch.margins)
        if self.next_token_weight:
            of_chosen, _ = logprobs.chunk(2)
            loss = loss - self.next_token_weight * of_chosen.mean()
        if self.safety_weight:
            weight = self.safety_weight * batch.weight
            loss = loss + weight * safety_loss(scores, batch.is_safe)
        return loss, chosen > rejected

    def count_tokens(self, batch: PairBatch) -> int:  # type: ignore[override]
        """Tokens that are not padding."""
        return int(batch.lengths.sum())

    def validation_step(  # type: ignore[override]
        self, batch: PairBatch, batch_idx: int
    ) -> None:
        """Log loss and accuracy."""
        loss, right = self._losses(batch)
        log = {"on_epoch": True, "sync_dist": True, "batch_size": len(right)}
        self.log("validation_loss", loss, **log)
        self.log("accuracy", right.float().mean(), prog_bar=True, **log)


def score_pairs(
    model: RewardModel, tokenizer: Tokenizer, pairs: Sequence[Preference]
) -> tuple[Tensor, Tensor]:
    """Raw scores of the chosen and of the rejected answers, both (N,)."""
    dialogs = [dialog for pair in pairs for dialog in dialogs_of(pair)]
    scores = model.score(tokenizer, dialogs).view(-1, 2)
    return scores[:, 0], scores[:, 1]


def count_right(
    chosen: Tensor, rejected: Tensor, labels: Sequence[str | None]
) -> dict[str | None, tuple[int, int]]:
    """For each label, such as a level: how many pairs are ranked right, of how many.

    Args:
        chosen, rejected: scores, (N,).
        labels: one for each pair.
    """
    right = (chosen > rejected).tolist()
    counts = {}
    for label in dict.fromkeys(labels):
        of_label = [r for r, other in zip(right, labels, strict=True) if other == label]
        counts[label] = (sum(of_label), len(of_label))
    return counts
