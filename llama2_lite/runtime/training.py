"""What all training commands share: the trainer's parts, logs, and going on."""

import csv
import ctypes
import logging
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from llama2_lite.corpus import TokenDataset
from llama2_lite.model import Llama
from llama2_lite.pretraining import (
    M,
    PretrainingModule,
    TokenDataModule,
    best_precision,
    on_one_device,
    processes,
    vocabulary_loss,
)
from llama2_lite.runtime.checkpoints import (
    Checkpoints,
    SafeCheckpointIO,
    newest_checkpoint,
    step_of,
)
from llama2_lite.runtime.convert import save_model
from llama2_lite.runtime.strategy import LayoutStrategy
from llama2_lite.scaling import find_llamas
from llama2_lite.tokenizer import Tokenizer

TRAINER_DEFAULTS = {
    "max_epochs": -1,  # one endless epoch; max_steps ends it
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,  # the loader knows its processes
    "num_sanity_val_steps": 0,
    "enable_progress_bar": False,  # there is one of ours
    "enable_model_summary": False,
}


def prepare_process() -> None:
    """Set up this process for training, quietly: memory, threads, warnings."""
    keep_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(physical_cores())
    for name in ("lightning.pytorch", "lightning.fabric", "torch.distributed.tensor"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # nobody changes in place what a module returns
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* view tensor")
    # Lightning's hints on loaders and loggers do not apply to ours.
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")


def keep_memory() -> None:
    """Make glibc keep freed memory instead of returning it after each step.

    A step asks for the same large blocks as the last one. By default each comes fresh
    from the system and is filled with zeros page by page, on some machines for a third
    of the step's time.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX, malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)


def physical_cores() -> int:
    """Cores that this process may use; two threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for number in os.sched_getaffinity(0):
        path = f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        siblings = Path(path)
        cores.add(siblings.read_text() if siblings.is_file() else number)
    return len(cores)


def compile_blocks(build: Callable[[], M], fill: Callable[[M], None]) -> M:
    """Compile each block: half a minute that pays off in runs of many minutes.

    For the ``lay_out`` of a module such as `PretrainingModule`. Parameter names stay as
    they are.
    """
    model = on_one_device(build, fill)
    for llama in find_llamas(model):
        for block in llama.layers:
            block.compile()
    return model


class CsvLog(Logger):
    """Figures by step in one CSV file, which goes on where a resumed run goes on.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.path = Path(path)
        self.columns: list[str] = []

    @property
    def name(self) -> str:
        """Lightning asks for one."""
        return "csv"

    @property
    def version(self) -> int:
        """Lightning asks for one."""
        return 0

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The configuration has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append a row, or write the file anew if there are new columns."""
        row = {"step": step, **metrics}
        row.pop("epoch", None)  # there is only one
        columns = list(dict.fromkeys([*self.columns, *row]))
        if columns != self.columns:
            old, self.columns = self.read(), columns
            self._write(old, "w")
        self._write([row], "a")

    def read(self) -> list[dict[str, Any]]:
        """The rows of the file, as text."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _write(self, rows: list[dict[str, Any]], mode: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open(mode, newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def resume(self, step: int) -> None:
        """Drop the rows of steps that will be done again."""
        rows = [row for row in self.read() if int(row["step"] or 0) < step]
        if rows:
            self.columns = list(rows[0])
            self._write(rows, "w")
        else:
            self.path.unlink(missing_ok=True)


class KeepBest(Callback):
    """Writes the model folder whenever the validation loss is the lowest so far.

    Args:
        folder: of the model.
        tokenizer: copied into it; a function, as it may not be there yet.
    """

    def __init__(self, folder: str | Path, tokenizer: Callable[[], Tokenizer]):
        self.folder = Path(folder)
        self.tokenizer = tokenizer
        self.best_loss = math.inf
        self.best_step = -1
        self.seen_step = -1

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Refuse to train what no step could be chosen of.

        Raises:
            ValueError: if there is nothing to validate on.
        """
        if sum(trainer.num_val_batches) == 0:
            _, n_groups = processes(trainer)
            raise ValueError(
                "nothing could be validated, so no step would be kept: hold out at "
                f"least {n_groups} samples, one for each process that has data of its "
                "own (data.validation_fraction, data.validation_windows, "
                "trainer.limit_val_batches)"
            )

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Compare and write."""
        self.seen_step = trainer.global_step
        loss = float(trainer.callback_metrics["validation_loss"])
        if loss < self.best_loss:
            self.best_loss, self.best_step = loss, trainer.global_step
            save_model(module.model, self.folder, self.tokenizer())

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        names = ("best_loss", "best_step", "seen_step")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        for name, value in state_dict.items():
            setattr(self, name, value)


class Clock(Callback):
    """Counts the seconds of training, those before an interruption too."""

    def __init__(self) -> None:
        self.seconds, self.started = 0.0, time.perf_counter()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Start."""
        self.started = time.perf_counter()

    def elapsed(self) -> float:
        """Seconds so far."""
        return self.seconds + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint."""
        return {"seconds": self.elapsed()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From the checkpoint."""
        self.seconds = state_dict["seconds"]


def trainer_parts(
    folder: Path,
    model_folder: Path,
    tokenizer: Callable[[], Tokenizer],
    *,
    checkpoint_every: int = 500,
    keep_checkpoints: int = 2,
    callbacks: list[Callback] | None = None,
    loggers: list[Logger] | None = None,
) -> dict[str, Any]:
    """Arguments for Lightning's Trainer, to train in a folder.

    The order of the callbacks matters: a checkpoint holds what those before it have
    noted.
    """
    return {
        "default_root_dir": folder,
        "callbacks": [
            *(callbacks or []),
            KeepBest(model_folder, tokenizer),
            Checkpoints(folder / "checkpoints", checkpoint_every, keep_checkpoints),
        ],
        "logger": [CsvLog(folder / "logs" / "metrics.csv"), *(loggers or [])],
        "plugins": [SafeCheckpointIO()],
        **TRAINER_DEFAULTS,
    }


def fit(
    trainer: Trainer,
    module: PretrainingModule,
    data: TokenDataModule,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """Train, from the newest whole checkpoint in the folder if there is one.

    Afterwards the model folder holds the model with the lowest validation loss.

    Raises:
        ValueError: if there is none, as no validation loss was finite.
    """
    choose = partial(newest_checkpoint, folder / "checkpoints")
    if isinstance(trainer.strategy, LayoutStrategy):
        checkpoint = trainer.strategy.together(choose)
    else:
        checkpoint = choose()
    step = 0
    if checkpoint is not None:
        step = step_of(checkpoint)
        if trainer.is_global_zero:
            say(f"continuing from step {step}")
    for logger in trainer.loggers:
        if isinstance(logger, CsvLog) and trainer.is_global_zero:
            logger.resume(step)
    checkpoint_io = trainer.strategy.checkpoint_io
    if isinstance(checkpoint_io, SafeCheckpointIO):
        checkpoint_io.module, checkpoint_io.whole = module, checkpoint
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    except SystemExit:  # Lightning's answer to Ctrl-C before the first step
        raise KeyboardInterrupt from None
    best = next(call for call in trainer.callbacks if isinstance(call, KeepBest))
    if best.seen_step < trainer.global_step:
        trainer.validate(module, datamodule=data, verbose=False)
    if best.best_step < 0:
        raise ValueError(
            "no validation loss was a finite number, so no model was kept; lower the "
            "learning rate (model.peak_lr, or model.settings.lr of ppo)"
        )


@contextmanager
def precision() -> Iterator[None]:
    """Autocast as in training."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    enabled = best_precision() == "bf16-mixed"
    with torch.autocast(device, torch.bfloat16, enabled=enabled):
        yield


@torch.no_grad()
def evaluate_loss(model: Llama, data: TokenDataset, batch_size: int = 32) -> float:
    """Mean loss over all windows of a dataset, in nats per token."""
    total = 0.0
    model.eval()
    device = model.norm.weight.device
    with precision():
        for start in range(0, len(data), batch_size):
            stop = min(start + batch_size, len(data))
            windows = torch.stack([data[i] for i in range(start, stop)]).to(device)
            hidden = model(windows[:, :-1], return_hidden=True)
            loss = vocabulary_loss(hidden, model.output.weight, windows[:, 1:])
            total += float(loss) * len(windows)
    return total / len(data)


def bits_per_character(loss: float, data: TokenDataset) -> float:
    """From nats per token to bits per character of the text behind a dataset."""
    return loss / math.log(2) * data.n_tokens / data.n_characters
