"""A training run of a second, in processes that are killed on purpose."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

STEPS = 12
KILLED = -signal.SIGKILL


def write_data(folder: Path) -> None:
    """A tokenizer and shards of a few hundred documents."""
    from llama2_lite.corpus import write_shards
    from llama2_lite.tokenizer import train_tokenizer

    texts = [f"{i} and {j} make {i + j}.\n" for i in range(20) for j in range(20)]
    tokenizer = train_tokenizer(texts, folder / "tokenizer.model", 290)
    write_shards(texts[40:], tokenizer, folder / "train")
    write_shards(texts[:40], tokenizer, folder / "validation")


def make_training(data_folder: Path, folder: Path, callbacks=(), **trainer_settings):
    """Trainer, module and data of the run."""
    from lightning.pytorch import Trainer, seed_everything

    from llama2_lite.model import LlamaConfig
    from llama2_lite.pretraining import PretrainingModule, TokenDataModule
    from llama2_lite.runtime.training import prepare_process, trainer_parts
    from llama2_lite.tokenizer import Tokenizer

    prepare_process()
    seed_everything(0, verbose=False)
    config = LlamaConfig(16, 1, 2, 2, 290, 32, max_seq_len=32)
    module = PretrainingModule(config, peak_lr=1e-2, warmup=2)
    data = TokenDataModule(
        data_folder / "train",
        data_folder / "validation",
        [(0.5, 16, 4), (0.5, 32, 2)],
        validation_windows=4,
    )
    parts = trainer_parts(
        folder,
        folder / "model",
        lambda: Tokenizer(data_folder / "tokenizer.model"),
        checkpoint_every=3,
        callbacks=list(callbacks),
    )
    settings = {
        "max_steps": STEPS,
        "val_check_interval": 4,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        **trainer_settings,
    }
    return Trainer(**parts, **settings), module, data


def train(data_folder: Path, folder: Path, callbacks=(), **trainer_settings):
    """Run to the end, from where an earlier process was killed."""
    from llama2_lite.runtime.training import fit

    made = make_training(data_folder, folder, callbacks, **trainer_settings)
    fit(*made, folder, print)
    return made


def train_and_die(
    data_folder: Path, folder: Path, name: str, nth: int, settings: dict
) -> None:
    """Be killed at the n-th call of a function that a save goes through."""
    from llama2_lite.runtime import checkpoints

    calls = 0
    original = getattr(checkpoints, name)

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(checkpoints, name, counted)
    train(data_folder, folder, **settings)


def leave_with(function, *args) -> None:
    """End the process with what a function returns, if that is an exit code."""
    code = function(*args)
    sys.exit(code if isinstance(code, int) else 0)


def spawn(function, *args):
    """A process that has begun to run a function, and exits with its code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["llama2_lite.runtime.training"])
    process = context.Process(target=leave_with, args=(function, *args))
    process.start()
    return process


def in_process(function, *args) -> int:
    """Run a function in a process of its own and return the exit code."""
    process = spawn(function, *args)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode
