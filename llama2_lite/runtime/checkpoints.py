"""Training checkpoints that survive a kill at any moment, without pickle.

A checkpoint is a folder: tensors in safetensors, everything else in JSON. It is
written under another name, with the size and checksum of each file, and renamed when
all of it is on disk; so a folder of the right name is whole, and what is damaged later
is noticed. Training continues from the newest one that is.

Where a model is divided among processes, each writes its part of the tensors, with its
place in the whole in the header of the file. Any other number of processes can read it.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from llama2_lite.runtime.processes import (
    from_all,
    in_all,
    in_first,
    is_first,
    own_share,
)

TENSORS, STATE, COMPLETE = "tensors.safetensors", "state.json", "complete.json"
PICKLES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
# Lightning would need these to build the module; here the configuration does it.
LEFT_OUT = ("hyper_parameters", "hparams_name", "hparams_type")


class Stopped(Exception):
    """Training was asked to stop, and has saved what it did."""


class SafeCheckpointIO(CheckpointIO):
    """Saves and loads Lightning's checkpoints as folders without pickle.

    Attributes:
        module: what checkpoints are loaded into, if they have to be of this model.
        whole: the checkpoint that `newest_checkpoint` gave, not to be read once more.
    """

    module: LightningModule | None = None
    whole: Path | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: str | os.PathLike[str],
        storage_options: Any = None,
    ) -> None:
        """Write a folder beside ``path`` and rename it when it is on disk.

        All processes of a run call this, each with its part of the tensors.
        """
        path = Path(path)
        beside = path.with_name(f"{path.name}.partial")
        tensors: dict[str, Tensor] = {}
        kept = {key: checkpoint[key] for key in checkpoint if key not in LEFT_OUT}
        state = encode_state(kept, tensors)

        def begin() -> None:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            (beside / STATE).write_text(json.dumps(state), encoding="utf-8")

        in_first(begin)
        write_tensors(tensors, beside)
        files: dict[str, Any] = {}
        for noted in from_all(note_files(own_files(beside))):
            files |= noted
        in_first(lambda: complete_checkpoint(beside, path, files))

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = None,
        place: "Place | None" = None,
    ) -> dict[str, Any]:
        """Read what `save_checkpoint` wrote.

        Args:
            place: see `read_tensors`.

        Raises:
            ValueError: if it is damaged, no folder, or of another model.
        """
        path = Path(path)
        if path.is_file():
            raise ValueError(f"{path} is not a folder; pickles are not opened here")
        if path != self.whole and (damage := find_damage(path)):
            raise ValueError(f"the checkpoint {path} {damage}")
        state = json.loads((path / STATE).read_text("utf-8"))
        if self.module is not None:
            check_model(path, state, self.module)
        tensors = read_tensors(path, place or (lambda name, shape: None))
        return decode_state(state, tensors)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete it; killed halfway, what is left does not count as complete."""
        path = Path(path)
        (path / COMPLETE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)


Place = Callable[[str, torch.Size], Tensor | None]


def check_model(path: Path, state: dict[str, Any], module: LightningModule) -> None:
    """Make sure that a checkpoint is of a model.

    Args:
        state: of the checkpoint, with the names of its tensors.

    Raises:
        ValueError: if not; it names the first tensor that differs.
    """
    known = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
    sizes = {
        name: tuple(tensor.size)
        for name, tensor in known.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    stored = {
        name: sizes[value["$tensor"]]
        for name, value in state.get("state_dict", {}).items()
    }
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    for name in sorted({**stored, **wanted}):
        found, needed = stored.get(name), wanted.get(name)
        if found != needed:
            had = f"has {name} of shape {found}" if found else f"has no {name}"
            needs = f"needs shape {needed}" if needed else "has none of that name"
            raise ValueError(
                f"the checkpoint {path} is of another model: it {had}, and this model "
                f"{needs}. Move it away, or choose another --output"
            )


def describe_model(model: Any) -> dict[str, Any]:
    """What has to be known besides its tensors to make a model again."""
    kind = type(model).__name__.removeprefix("FSDP")  # fully_shard makes a new class
    return {"kind": kind, "config": asdict(model.config)}


def write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors; of those that are divided, each process writes its part.

    Raises:
        OSError: if that is not possible, as on a full disk.
    """
    is_divided = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    try:
        if is_divided:
            writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
            save(tensors, storage_writer=writer)
        else:
            in_first(lambda: save_file(tensors, folder / TENSORS))
    except (SafetensorError, CheckpointException) as error:
        raise OSError(f"{folder}: {error}") from None


def read_tensors(
    folder: Path, place: Place, names: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Tensors in a folder, by name, whoever wrote them.

    Args:
        place: the tensor to fill, by name and shape, which may be divided among
            processes; a new and whole one where it gives none.
        names: which to read; all if left out.

    Raises:
        ValueError: if a tensor to fill has another shape.
    """
    known = HuggingFaceStorageReader(str(folder)).read_metadata()
    tensors: dict[str, Tensor] = {}
    for name, stored in known.state_dict_metadata.items():
        if not isinstance(stored, TensorStorageMetadata) or name not in (
            names or [name]
        ):
            continue
        given = place(name, stored.size)
        if given is None:
            given = torch.empty(stored.size, dtype=stored.properties.dtype)
        if given.shape != stored.size:
            raise ValueError(
                f"{folder}: tensor {name} has shape {tuple(stored.size)}, but this "
                f"model needs {tuple(given.shape)}"
            )
        tensors[name] = given
    is_divided = any(isinstance(tensor, DTensor) for tensor in tensors.values())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        load(
            tensors,
            storage_reader=HuggingFaceStorageReader(str(folder)),
            no_dist=not is_divided,
        )
    return tensors


def encode_state(value: Any, tensors: dict[str, Tensor], name: str = "") -> Any:
    """Turn nested Python values into JSON values, moving tensors to ``tensors``.

    Raises:
        TypeError: for anything that only pickle could store.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return {"$tensor": _add_tensor(value.detach(), tensors, name)}
    if isinstance(value, np.ndarray):
        return {"$array": _add_tensor(torch.from_numpy(value), tensors, name)}
    if isinstance(value, dict):
        items = {
            key: encode_state(item, tensors, f"{name}/{key}" if name else str(key))
            for key, item in value.items()
        }
        if all(isinstance(key, str) and key[:1] != "$" for key in items):
            return items
        return {"$dict": [[encode_state(key, {}), items[key]] for key in items]}
    if isinstance(value, list | tuple):
        entries = [
            encode_state(item, tensors, f"{name}/{i}") for i, item in enumerate(value)
        ]
        return entries if isinstance(value, list) else {"$tuple": entries}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"{name} is a {type(value).__name__}, which only pickle can store")


def _add_tensor(tensor: Tensor, tensors: dict[str, Tensor], name: str) -> str:
    """Add a tensor, or find it again: tied weights are one tensor with two names."""
    for other, stored in tensors.items():
        if (
            address(stored) == address(tensor) != 0
            and stored.shape == tensor.shape
            and stored.stride() == tensor.stride()
            and stored.dtype == tensor.dtype
        ):
            return other
    while name in tensors:
        name += "'"
    is_divided = isinstance(tensor, DTensor)
    is_view = not is_divided and tensor.untyped_storage().nbytes() != tensor.nbytes
    tensors[name] = tensor.clone() if is_view else tensor.contiguous()
    return name


def address(tensor: Tensor) -> int:
    """Where a tensor, or what this process has of it, begins in memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).data_ptr()


def decode_state(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Undo `encode_state`."""
    if isinstance(value, list):
        return [decode_state(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "$tensor" in value:
        return tensors[value["$tensor"]]
    if "$array" in value:
        return tensors[value["$array"]].numpy()
    if "$tuple" in value:
        return tuple(decode_state(item, tensors) for item in value["$tuple"])
    if "$dict" in value:
        pairs = value["$dict"]
        return {decode_state(k, tensors): decode_state(v, tensors) for k, v in pairs}
    return {key: decode_state(item, tensors) for key, item in value.items()}


def own_files(folder: Path) -> list[Path]:
    """The files that this process has written: its part, and the first the rest."""
    number = torch.distributed.get_rank() + 1 if not is_first() else 1
    return [
        file
        for file in sorted(folder.iterdir())
        if file.name.startswith(f"shard-{number:05}-")
        or (is_first() and not file.name.startswith("shard-"))
    ]


def note_files(files: list[Path]) -> dict[str, Any]:
    """Wait for the disk, and note size and checksum of files."""
    noted = {}
    for file in files:
        _sync(file)
        noted[file.name] = {"bytes": file.stat().st_size, "sha256": _checksum(file)}
    return noted


def complete_checkpoint(beside: Path, path: Path, files: dict[str, Any]) -> None:
    """Write down what a checkpoint consists of, wait for the disk, and rename it."""
    (beside / COMPLETE).write_text(json.dumps({"files": files}), encoding="utf-8")
    _sync(beside / COMPLETE)
    _sync(beside)
    shutil.rmtree(path, ignore_errors=True)  # of this step, and found damaged
    beside.rename(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the list of files in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None if nothing is.

    All processes of a run call this: each reads its share of the files.
    """
    files = in_first(lambda: listed_files(path))
    if files is None:
        return "is not complete"
    if STATE not in files:
        return f"lacks {STATE}"

    names = own_share(sorted(files))  # the shards, which take long, come first

    def in_share() -> str | None:
        return next(filter(None, (damage_of(path / n, files[n]) for n in names)), None)

    return next(filter(None, in_all(in_share)), None)


def listed_files(path: Path) -> dict[str, Any] | None:
    """Size and checksum of each file of a checkpoint, if it is complete."""
    try:
        files: dict[str, Any] = json.loads((path / COMPLETE).read_bytes())["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return files


def damage_of(file: Path, expected: dict[str, Any]) -> str | None:
    """What is wrong with a file of a checkpoint, as in `find_damage`."""
    if not file.is_file():
        return f"lacks {file.name}"
    size = file.stat().st_size
    if size != expected["bytes"]:
        return f"has {size} bytes of {file.name} instead of {expected['bytes']}"
    if _checksum(file) != expected["sha256"]:
        return f"has a {file.name} that does not match its checksum"
    return None


def newest_checkpoint(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in a folder; warns of each that is not.

    All processes of a run call this, once they are connected, and find the same.

    Raises:
        ValueError: if there is a pickle among the checkpoints, or if the processes do
            not look into the same folder.
    """
    folder = Path(folder)
    in_first(lambda: refuse_pickles(folder))
    for path in sorted(list_checkpoints(folder), reverse=True):
        damage = "is not complete" if path.suffix else find_damage(path)
        if damage is None:
            return path
        if is_first():
            warnings.warn(f"skipped: the checkpoint {path} {damage}", stacklevel=2)
    return None


def refuse_pickles(folder: Path) -> None:
    """Make sure that there are none among the checkpoints in a folder.

    Raises:
        ValueError: if there is one.
    """
    for file in sorted(folder.glob("*")) + sorted(folder.glob("*/*")):
        if file.suffix in PICKLES:
            raise ValueError(
                f"{file} is a pickle, which can run any code when it is opened; "
                "checkpoints here are safetensors and JSON. Move it away"
            )


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, complete or not, as the first process sees them.

    Raises:
        ValueError: if the newest is another one for another process.
    """
    found = in_all(lambda: list(folder.glob("step-*")))
    newest = [
        max((path.name for path in paths if not path.suffix), default="none")
        for paths in found
    ]
    for number, name in enumerate(newest):
        if name != newest[0]:
            raise ValueError(
                f"the newest checkpoint in {folder} is {newest[0]} for process 0, but "
                f"{name} for process {number}: the folder of the run must be on a disk "
                "that all share"
            )
    return found[0]


def step_of(path: Path) -> int:
    """The number of steps that a checkpoint has behind it."""
    return int(path.name.removeprefix("step-"))


class Checkpoints(Checkpoint):
    """Saves every so many steps, at the end, and when asked to stop.

    Ctrl-C and SIGTERM finish the step, save and raise `Stopped`; a second one is a
    `KeyboardInterrupt`. A validation that is due is done before the checkpoint, so
    that a run that continues from it has seen the same.

    Args:
        folder: of the checkpoints.
        every: steps from one to the next.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: str | Path, every: int = 500, keep: int = 2):
        if every < 1 or keep < 1:
            raise ValueError(f"{every=} and {keep=} checkpoints must be at least 1")
        self.folder = Path(folder)
        self.every = every
        self.keep = keep
        self.step = 0
        self.signal = 0
        self.stops = False
        self.random_states: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Listen to signals; one process alone is stopped at once until it trains."""
        if stage == "fit" and trainer.world_size > 1:
            self._listen(trainer)

    def _listen(self, trainer: Trainer) -> None:
        self.speaks = trainer.is_global_zero
        if threading.current_thread() is threading.main_thread():
            for name in (signal.SIGINT, signal.SIGTERM):
                signal.signal(name, self._on_signal)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """Restore the random numbers, and listen to signals until training ends."""
        self.step = trainer.global_step
        self._listen(trainer)
        if self._asked_to_stop(trainer):
            raise Stopped(f"stopped at step {self.step}")
        if self.random_states is None:
            # a run that finds its data sampled has drawn less than one that samples
            torch.manual_seed(torch.initial_seed())
        else:
            random.setstate(self.random_states["python"])
            np.random.set_state(self.random_states["numpy"])  # noqa: NPY002
            torch.set_rng_state(self.random_states["torch"])
            if len(self.random_states["cuda"]) == torch.cuda.device_count():
                torch.cuda.set_rng_state_all(self.random_states["cuda"])

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, *args: Any
    ) -> None:
        """Stop, if the last step was saved in order to; its figures are logged now."""
        if self.stops:
            raise Stopped(f"stopped and saved at step {self.step}")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Stop, if asked to in the last step."""
        self.on_train_batch_start(trainer, module)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        if self.speaks:
            os.write(2, b"\nsaving after this step; once more stops at once\n")

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, *args: Any
    ) -> None:
        """Save if it is time to, unless `on_validation_end` comes first."""
        if trainer.global_step == self.step:
            return  # gradients are still being accumulated
        self.step = trainer.global_step
        loop = trainer.fit_loop
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        """Save if it is time to."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save_if_due(trainer)

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether any process was: all of them stop after the same step."""
        stops = bool(self.signal)
        if trainer.world_size > 1:
            stops = trainer.strategy.reduce_boolean_decision(stops, all=False)
        return stops

    def _save_if_due(self, trainer: Trainer) -> None:
        stops = self._asked_to_stop(trainer)
        if stops or self.step % self.every == 0 or self.step == trainer.max_steps:
            path = self.folder / f"step-{self.step:08}"
            trainer.save_checkpoint(path)
            if trainer.is_global_zero:
                self._remove_old()
        self.stops = stops

    def _remove_old(self) -> None:
        paths = [path for path in self.folder.glob("step-*") if not path.suffix]
        # later ones are damaged, or there would have been no need to do this step again
        done = [path for path in paths if path.name <= f"step-{self.step:08}"]
        for path in sorted(done)[: -self.keep]:
            SafeCheckpointIO().remove_checkpoint(path)
        for path in self.folder.glob("step-*.partial"):
            shutil.rmtree(path, ignore_errors=True)

    def on_save_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the state of the random number generators, and what the model is."""
        checkpoint["model"] = describe_model(module.model)
        checkpoint["random"] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(),  # noqa: NPY002
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def on_load_checkpoint(
        self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the state of the random number generators until training starts.

        Lightning counts parts of batches; their number in a step may be another now.
        """
        self.random_states = checkpoint["random"]
        n_parts = checkpoint["global_step"] * trainer.accumulate_grad_batches
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        more = n_parts - progress["total"]["ready"]
        for counts in (progress["total"], progress["current"]):
            counts |= {name: count + more for name, count in counts.items()}
