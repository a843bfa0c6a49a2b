"""Pretraining.

Exported from book/09_pretraining.md, which explains every part. Edit it there,
then `make export`.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from lightning import LightningDataModule, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Subset

from llama2_lite.corpus import TokenDataset
from llama2_lite.model import Llama, LlamaConfig


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log probability of the tokens that come next, in nats.

    Args:
        logits: (B, T, V), any floating point type.
        targets: (B, T), the token that follows each position.

    Returns:
        A scalar, fp32.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class VocabularyLoss(torch.autograd.Function):
    """Output layer and `next_token_loss` in one, a piece of the tokens at a time.

    The gradient of the logits is known as soon as the logits are: softmax minus
    one-hot. So each piece is used up at once, and neither all logits nor their
    gradients ever exist together.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, piece: int
    ) -> Tensor:
        """Mean loss of ``hidden`` (N, C), ``weight`` (V, C), ``targets`` (N,)."""
        total = torch.zeros((), device=hidden.device)
        needs_gradient = any(ctx.needs_input_grad)
        if needs_gradient:
            hidden_gradient = torch.empty_like(hidden)
            weight_gradient = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(targets), piece):
            rows = slice(start, start + piece)
            target = targets[rows, None]
            scores = (hidden[rows] @ weight.T).float()  # (piece, V)
            scores -= scores.amax(-1, keepdim=True)
            total -= scores.gather(1, target).sum()
            powers = scores.exp_()
            sums = powers.sum(-1, keepdim=True)
            total += sums.log().sum()
            if needs_gradient:
                error = powers.div_(sums)  # the softmax, in place
                error.scatter_add_(1, target, -torch.ones_like(sums))
                error = error.to(hidden.dtype)
                hidden_gradient[rows] = error @ weight
                weight_gradient += error.T @ hidden[rows]
        ctx.n_tokens = len(targets)
        if needs_gradient:
            ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Scale what `forward` has computed already."""
        hidden_gradient, weight_gradient = ctx.saved_tensors
        scale = gradient / ctx.n_tokens
        return (
            hidden_gradient * scale.to(hidden_gradient.dtype),
            weight_gradient * scale,
            None,
            None,
        )


def whole(tensor: Tensor) -> Tensor:
    """A tensor; one that is divided among processes (chapter 10) is put together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def vocabulary_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, piece: int = 512
) -> Tensor:
    """`next_token_loss` from the last hidden states, without holding all logits.

    Computes in the type of autocast where that is on, else in that of ``hidden``;
    sums are fp32 in any case.

    Args:
        hidden: (B, T, C), what the output layer would be given.
        weight: (V, C), of the output layer; may be the embedding's, tied.
        targets: (B, T).
        piece: tokens whose logits exist at a time.

    Returns:
        A scalar, fp32.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = hidden.flatten(0, -2)
    return VocabularyLoss.apply(rows, whole(weight), targets.flatten(), piece)


def configure_optimizer(
    model: nn.Module, lr: float, weight_decay: float = 0.1
) -> torch.optim.AdamW:
    """AdamW as in the paper, with weight decay on the matrices of the layers only.

    The gains of the norms scale, and the rows of the embedding look up: neither is
    decayed (our choice; the paper says 0.1 and not on what). A head tied to the
    embedding counts as the embedding. Source: paper §2.2.
    """
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for parameter in model.parameters():
        is_matrix = parameter.dim() > 1 and id(parameter) not in embeddings
        (decayed if is_matrix else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-5, fused=True)


def learning_rate(
    step: int, n_steps: int, *, peak: float, warmup: int, floor: float = 0.1
) -> float:
    """Linear warm-up, then a cosine from ``peak`` down to ``floor * peak``.

    Args:
        step: which update this is, from 0.
        n_steps: how many there will be.
        peak: reached by the last step of the warm-up.
        warmup: number of steps that rise.
        floor: what remains at the end, as a share of the peak. Source: paper §2.2.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step + 1 - warmup) / max(1, n_steps - warmup))
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def best_precision() -> str:
    """Lightning's name of the fastest type for matrix products that is safe here.

    bf16 with fp32 weights on GPUs and on processors with instructions for it
    (AVX512-BF16, AMX), else fp32.
    """
    if torch.cuda.is_available():
        fast = torch.cuda.is_bf16_supported()
    else:
        has = torch.cpu.get_capabilities()
        fast = any(has.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bf16-mixed" if fast else "32-true"


M = TypeVar("M", bound=nn.Module)


def on_one_device(build: Callable[[], M], fill: Callable[[M], None]) -> M:
    """Make a model without memory, give it memory, then values: the plain layout.

    Args:
        build: makes the model.
        fill: gives its parameters their values, in place.
    """
    device = torch.get_default_device()
    with torch.device("meta"):
        model = build()
    model.to_empty(device=device)
    fill(model)
    return model


LayOut = Callable[[Callable[[], M], Callable[[M], None]], M]


def processes(trainer: Trainer) -> tuple[int, int]:
    """Rank and number of the processes that see different data."""
    kwargs = trainer.distributed_sampler_kwargs
    return (kwargs["rank"], kwargs["num_replicas"]) if kwargs else (0, 1)


class PretrainingModule(LightningModule):
    """A Llama that learns to predict the next token.

    Logs ``loss`` (nats per token), ``learning_rate``, ``gradient_norm`` and
    ``tokens_per_second``; in validation ``validation_loss`` and
    ``bits_per_character``. The length of the schedule is the trainer's ``max_steps``.

    Args:
        config: of the model, which is built when training starts.
        peak_lr: the highest learning rate.
        warmup: steps until it is reached.
        weight_decay: of the matrices, see `configure_optimizer`.
        clip_norm: longer gradients are scaled to this length.
        seed: of the initial weights.
        lay_out: makes the model where it should live, from `build` and `fill`.
    """

    model: Llama

    def __init__(
        self,
        config: LlamaConfig,
        peak_lr: float = 3e-4,
        warmup: int = 2000,
        weight_decay: float = 0.1,
        clip_norm: float = 1.0,
        seed: int = 0,
        lay_out: LayOut[Any] = on_one_device,
    ):
        super().__init__()
        self.config = config
        self.peak_lr = peak_lr
        self.warmup = warmup
        self.weight_decay = weight_decay
        self.clip_norm = clip_norm
        self.seed = seed
        self.lay_out = lay_out
        self.first_bad_step = torch.tensor(-1)
        self.step_loss = torch.tensor(0.0)

    def configure_model(self) -> None:
        """Build the model; Lightning calls this where its weights should live."""
        if not hasattr(self, "model"):
            self.model = self.lay_out(self.build, self.fill)

    def build(self) -> Llama:
        """The model, whose weights do not count yet."""
        return Llama(self.config)

    def fill(self, model: Llama) -> None:
        """Random weights; fine-tuning reads some instead."""
        model.init_weights(self.seed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer; `on_train_batch_start` sets its learning rate."""
        if self.trainer.max_steps < 1:
            raise ValueError(
                "Trainer(max_steps=...) must be given: the schedule needs it"
            )
        return configure_optimizer(self.model, self.peak_lr, self.weight_decay)

    def loss(self, windows: Tensor) -> Tensor:
        """Mean loss of windows of tokens, (B, T + 1)."""
        hidden = self.model(windows[:, :-1], return_hidden=True)
        return vocabulary_loss(hidden, self.model.output.weight, windows[:, 1:])

    def weigh(self, batch: Tensor) -> Tensor | float:
        """Weight of a batch among the parts of its step: 1, as all are as large."""
        return 1.0

    def count_tokens(self, batch: Tensor) -> int:
        """How many tokens of a batch, (B, T + 1), are predicted: for the pace."""
        return batch[:, 1:].numel()

    def on_train_start(self) -> None:
        """Start the clock, and forget what went wrong before."""
        self.first_bad_step = torch.full((), -1, device=self.device)
        self.step_loss = torch.zeros((), device=self.device)
        self._restart_clock()

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Set the learning rate: a function of the step alone, so nothing to save."""
        self.lr = learning_rate(
            self.global_step,
            self.trainer.max_steps,
            peak=self.peak_lr,
            warmup=self.warmup,
        )
        for group in self.optimizers().param_groups:
            group["lr"] = self.lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """The loss of one batch, (B, T + 1), with its weight in the step."""
        loss = self.loss(batch) * self.weigh(batch)
        self._note_if_bad(loss)
        self.step_loss += loss.detach() / self.trainer.accumulate_grad_batches
        self.n_tokens += self.count_tokens(batch) * processes(self.trainer)[1]
        return loss

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip; here and not by the trainer, which in mixed precision refuses to.

        Called once a step, it also logs the loss of the step, over all its parts.
        """
        if gradient_clip_val is not None:
            raise ValueError("set clip_norm instead of Trainer(gradient_clip_val=...)")
        norm = whole(nn.utils.clip_grad_norm_(self.parameters(), self.clip_norm))
        self._note_if_bad(norm)
        self.log("gradient_norm", norm)
        loss = self.trainer.strategy.reduce(self.step_loss, reduce_op="mean")
        self.log("loss", loss, prog_bar=True)
        self.step_loss = torch.zeros_like(self.step_loss)

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        """Log the pace, and stop if a number is no longer finite."""
        is_time_to_log = self.global_step % self.trainer.log_every_n_steps == 0
        if is_time_to_log or self.device.type == "cpu":
            self.stop_if_bad()
        if is_time_to_log:
            seconds = time.perf_counter() - self.started
            self.log("tokens_per_second", self.n_tokens / seconds, prog_bar=True)
            self.log("learning_rate", self.lr)
            self._restart_clock()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to save a model that is not a number, over one that was."""
        self.stop_if_bad()

    def _note_if_bad(self, value: Tensor) -> None:
        """Remember the step at which a value was first not finite.

        It stays on the device, so that the processor need not wait for a GPU.
        """
        is_news = ~value.detach().isfinite() & (self.first_bad_step < 0)
        self.first_bad_step.masked_fill_(is_news, self.global_step)

    def stop_if_bad(self) -> None:
        """Stop if a loss or gradient was not finite.

        Raises:
            FloatingPointError: it names the step.
        """
        if (step := int(self.first_bad_step)) >= 0:
            raise FloatingPointError(
                f"at step {step} the loss or its gradient is not a finite number; the "
                "last checkpoint is from before. Try a lower learning rate or a longer "
                "warm-up"
            )

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Log the loss of one batch, (B, T + 1), also in bits per character."""
        loss = self.loss(batch)
        bits = loss / math.log(2) * self.trainer.datamodule.tokens_per_character
        log = {"on_epoch": True, "sync_dist": True, "batch_size": len(batch)}
        self.log("validation_loss", loss, **log)
        self.log("bits_per_character", bits, prog_bar=True, **log)

    def on_validation_end(self) -> None:
        """Do not count the time of validation."""
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.n_tokens, self.started = 0, time.perf_counter()


class MixedLengthLoader:
    """Batches of several sequence lengths, mixed evenly, without end.

    The next batch is of the length furthest behind its share.

    Args:
        datasets: one for each length.
        shares: of the batches, one for each length.
        batch_sizes: windows of a batch of each length, over all processes.
        rank, world_size: which of how many processes this is.
        n_parts: how many parts a process takes its share in; gradients accumulate.

    Raises:
        ValueError: if a batch cannot be divided evenly.
    """

    def __init__(
        self,
        datasets: list[TokenDataset],
        shares: list[float],
        batch_sizes: list[int],
        rank: int = 0,
        world_size: int = 1,
        n_parts: int = 1,
    ):
        total = world_size * n_parts
        if uneven := [size for size in batch_sizes if size % total]:
            raise ValueError(
                f"a batch of {uneven[0]} cannot be divided evenly among {world_size} "
                f"processes x {n_parts} parts to accumulate = {total}"
            )
        self.datasets = datasets
        self.shares = shares
        self.batch_sizes = batch_sizes
        self.rank = rank
        self.world_size = world_size
        self.n_parts = n_parts
        self.taken = [0] * len(datasets)

    def __iter__(self) -> Iterator[Tensor]:
        """Yield (B, T + 1) tensors, int64, the parts of this process in each step."""
        kinds, n_parts = range(len(self.datasets)), self.world_size * self.n_parts
        while True:
            kind = min(kinds, key=lambda i: (self.taken[i] + 1) / self.shares[i])
            step = self.taken[kind]
            self.taken[kind] += 1
            size, first = self.batch_sizes[kind] // n_parts, self.rank * self.n_parts
            for part in range(first, first + self.n_parts):
                yield self.datasets[kind].batch(step, size, part, n_parts)

    def __len__(self) -> int:
        """More than any run takes: without a length, Lightning reads ahead by one."""
        return 2**31

    def state_dict(self) -> dict[str, Any]:
        """The batches taken of each length, and what fixes the batches to come."""
        return {"taken": list(self.taken), **self._identity()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue, possibly with another number of processes.

        Raises:
            ValueError: if lengths, number of tokens or seed are others.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(
                    f"the checkpoint was made with {name} = {state[name]}, not {value}"
                )
        self.taken = list(state["taken"])

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.datasets[0].seed,
            "tokens": self.datasets[0].n_tokens,
            "lengths": [
                [share, dataset.sequence_length, batch_size]
                for share, dataset, batch_size in zip(
                    self.shares, self.datasets, self.batch_sizes, strict=True
                )
            ],
        }


class TokenDataModule(LightningDataModule):
    """Shards for training and validation, in windows of one or several lengths.

    Short windows are cheap, and a few long ones among them teach the long positions.

    Args:
        train: folder of shards, see `llama2_lite.corpus.write_shards`.
        validation: another.
        lengths: (share of the batches, sequence length, windows of a batch over all
            processes) for each length; batches of all lengths alternate evenly.
        validation_windows: at most so many, of the longest length.
        seed: of the order of the windows.
    """

    def __init__(
        self,
        train: str | Path,
        validation: str | Path,
        lengths: list[tuple[float, int, int]],
        validation_windows: int = 64,
        seed: int = 0,
    ):
        super().__init__()
        shares = [share for share, _, _ in lengths]
        if not math.isclose(sum(shares), 1) or min(shares) <= 0:
            raise ValueError(
                f"the shares of the lengths are {shares}, not positive with the sum 1"
            )
        self.train = train
        self.validation = validation
        self.lengths = lengths
        self.validation_windows = validation_windows
        self.seed = seed

    def setup(self, stage: str | None = None) -> None:
        """Open the shards; each process has to."""
        lengths = [length for _, length, _ in self.lengths]
        self.datasets = [
            TokenDataset(self.train, length, seed=self.seed, verify=i == 0)
            for i, length in enumerate(lengths)
        ]
        self.held_out = TokenDataset(self.validation, max(lengths))
        self.tokens_per_character = self.held_out.n_tokens / self.held_out.n_characters

    def train_dataloader(self) -> MixedLengthLoader:
        """Batches (B, T + 1) without end."""
        shares = [share for share, _, _ in self.lengths]
        batch_sizes = [batch_size for _, _, batch_size in self.lengths]
        n_parts = self.trainer.accumulate_grad_batches
        return MixedLengthLoader(
            self.datasets, shares, batch_sizes, *processes(self.trainer), n_parts
        )

    def val_dataloader(self) -> DataLoader[Tensor]:
        """The first windows of the validation shards, in order."""
        rank, world_size = processes(self.trainer)
        n_windows = min(self.validation_windows, len(self.held_out))
        n_windows -= n_windows % world_size  # every process as many
        batch_size = min(size for _, _, size in self.lengths) // world_size
        places = range(rank, n_windows, world_size)
        mine: Subset[Tensor] = Subset(self.held_out, places)  # type: ignore[arg-type]
        return DataLoader(mine, batch_size)
