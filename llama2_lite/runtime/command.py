"""What the training commands share: their command line and the folder of a run."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse.typing import PositiveFloat, PositiveInt
from lightning import LightningDataModule, LightningModule
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from llama2_lite.pretraining import best_precision
from llama2_lite.runtime.artifacts import write_json
from llama2_lite.runtime.configs import (
    CONFIGS,
    Seed,
    check_ranges,
    explain,
    find_config,
    read_yaml,
)
from llama2_lite.runtime.progress import TrainingProgress, make_console
from llama2_lite.runtime.stopping import Watch
from llama2_lite.runtime.strategy import divide
from llama2_lite.runtime.training import TRAINER_DEFAULTS, fit, trainer_parts
from llama2_lite.runtime.usage import SUMMARIES
from llama2_lite.scaling import Layout
from llama2_lite.tokenizer import Tokenizer

# What belongs to a run in its folder; everything else there is somebody else's.
OWN = (
    "config.yaml",
    "run.json",
    "result.json",
    "corpus",
    "sampled",
    "checkpoints",
    "logs",
    "model",
)


class TrainingCommand(LightningCLI):
    """Lightning's trainer, a module and its data, from a command line.

    A subclass names its module and its data, and says what `finish` shows.

    Attributes:
        name: of the command.
        module, data: the classes to build.
        not_decisive: keys of the configuration that say where things are, and nothing
            about the result.
        trainer_defaults: arguments of the trainer that are not Lightning's.
    """

    name: ClassVar[str]
    module: ClassVar[type[LightningModule]]
    data: ClassVar[type[LightningDataModule]]
    not_decisive: ClassVar[tuple[str, ...]] = ("data.folder", "data.files")
    trainer_defaults: ClassVar[dict[str, Any]] = TRAINER_DEFAULTS

    def __init__(self, arguments: list[str]):
        self.console = make_console()
        super().__init__(
            self.module,
            self.data,
            save_config_callback=None,
            trainer_defaults=self.trainer_defaults,
            parser_kwargs={
                "exit_on_error": False,
                "prog": f"llama2-lite {self.name}",
            },
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What belongs to no class."""
        add, output = parser.add_argument, f"runs/{self.name}"
        add("--output", type=Path, default=output, help="Folder of the run.")
        add("--seed", type=Seed, default=0, help="Of the weights and the data.")
        add("--checkpoint_every", type=int, default=500, help="Steps between them.")
        add("--keep_checkpoints", type=int, default=2, help="How many stay.")
        add("--force", action="store_true", help="Delete another run that is there.")
        parser.add_class_arguments(Layout, "layout")
        what = "Windows that a process takes at a time at most; gradients accumulate."
        add("--device_batch", type=PositiveInt | None, default=None, help=what)
        seconds, what = Watch.seconds, "Seconds that Ctrl-C and SIGTERM allow it."
        add("--stop_within", type=PositiveFloat, default=seconds, help=what)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and turn each error into one that names the key and its neighbours."""
        try:
            self.config = parser.parse_args(with_config_paths(args, self.name))
        except Exception as error:
            raise ValueError(explain(str(error), parser)) from None

    def _set_seed(self) -> None:
        seed_everything(self.config.seed, verbose=False)

    def before_instantiate_classes(self) -> None:
        """Choose what the configuration leaves open, and refuse what makes no sense."""
        check_ranges("model", vars(self.config.model))
        check_ranges("trainer", vars(self.config.trainer))
        if self.config.trainer.precision is None:
            self.config.trainer.precision = best_precision()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model; it need not be there before training."""
        return self.datamodule.tokenizer()

    def callbacks(self) -> list[Callback]:
        """What watches the training, besides what every run has."""
        return [TrainingProgress(self.name, self.console)]

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with our parts, to which the configuration may add."""
        config = self.config
        given = {k: v for k, v in self.config_init.trainer.items() if v is not None}
        parts = trainer_parts(
            config.output,
            config.output / "model",
            self.tokenizer,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            callbacks=[*as_list(given.pop("callbacks", [])), *self.callbacks()],
            loggers=[
                TensorBoardLogger(config.output, name="logs", version=""),
                *as_list(given.pop("logger", [])),
            ],
        )
        parts["plugins"] += as_list(given.pop("plugins", []))
        layout, batch = self.config_init.layout, config.device_batch
        sizes = self.model.config
        parts |= given
        try:
            return Trainer(**divide(parts, layout, sizes, self.batches(), batch))
        except TypeError as error:
            raise ValueError(f"trainer: {error}") from None

    def batches(self) -> list[tuple[int, int]]:
        """Sequence length and windows of a batch over all processes, for each kind."""
        return [(1, self.datamodule.batch_size)]

    def describe(self) -> dict[str, Any]:
        """What decides the result of the run, key by key, as JSON values."""
        config = yaml.safe_load(self.parser.dump(self.config))
        keys = ("max_steps", "precision")
        kept = {
            "command": self.name,
            "model": config["model"],
            "data": config["data"],
            "seed": config["seed"],
            "trainer": {key: config["trainer"][key] for key in keys},
            "source": self.datamodule.source(),
        }
        flat = flatten(kept)
        for name in self.not_decisive:  # what the files are is in the source
            flat.pop(name, None)
        return json.loads(json.dumps(flat))

    def run(self) -> None:
        """Train as the arguments say, or go on with what they began."""
        Watch.seconds = self.config.stop_within
        folder, is_first = Path(self.config.output), self.trainer.is_global_zero
        with self.claimed(folder) if is_first else nullcontext():
            fit(self.trainer, self.model, self.datamodule, folder, self.console.print)
            if is_first:
                self.finish(folder)

    @contextmanager
    def claimed(self, folder: Path) -> Iterator[None]:
        """Make a folder that of this run alone, and note there what it does."""
        wanted, dumped = self.describe(), self.parser.dump(self.config)
        inputs = flatten(yaml.safe_load(dumped))
        with held(folder):
            claim_folder(folder, wanted, self.config.force, inputs)
            (folder / "config.yaml").write_text(dumped, "utf-8")
            for path in folder.glob(".model.*"):  # models that a kill cut short
                shutil.rmtree(path, ignore_errors=True)
            yield

    def finish(self, folder: Path) -> None:
        """Measure the result, show it, and write it to ``result.json``."""
        raise NotImplementedError


def as_list(value: Any) -> list[Any]:
    """One or several; yes and no are none, as ours are there in any case."""
    if isinstance(value, bool):
        return []
    return value if isinstance(value, list) else [value]


def as_texts(key: str, value: str | list[str]) -> list[str]:
    """One text or several, as a command line gives them.

    Raises:
        ValueError: if a list was meant, but YAML reads its texts as something else.
    """
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        raise ValueError(
            f"{key}: {value} is no list of texts; put each of them into quotes, as in "
            """'["ROMEO:", "JULIET:"]'"""
        )
    return as_list(value)


def with_config_paths(arguments: list[str], command: str) -> list[str]:
    """Arguments with each ``--config NAME`` as a path to a readable file, in front.

    So a key on the command line counts, wherever it stands.

    Raises:
        FileNotFoundError, ValueError: see `find_config` and `read_yaml`, or if it is
            the one that comes with the package for another command.
    """
    configs: list[str] = []
    others: list[str] = []
    left = iter(arguments)
    for argument in left:
        key, equals, name = argument.partition("=")
        if key not in ("--config", "-c") or not (equals or (name := next(left, ""))):
            others.append(argument)
            continue
        path = find_config(name)
        if path.parent == CONFIGS and path.stem in SUMMARIES and path.stem != command:
            raise ValueError(
                f"the configuration {name!r} is one for llama2-lite {path.stem}, not "
                f"for {command}; copy what you need of it into a file of your own"
            )
        if read_yaml(path):
            configs.append(f"--config={path}")
    return configs + others


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the system lets go when this process ends.

    Raises:
        FileExistsError: if another process holds it, or it is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"another process is at work in {folder}; wait for it, or choose "
                "another --output"
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(opened)


def claim_folder(
    folder: Path, wanted: dict[str, Any], force: bool, inputs: Mapping[str, Any]
) -> None:
    """Make sure that a folder is empty or holds this very run.

    Args:
        wanted: what decides the result of the run.
        force: whether another run in the folder is deleted.
        inputs: configuration by key; what it names is not deleted.

    Raises:
        FileExistsError: if it holds anything else and ``force`` is not given.
        ValueError: if one of the inputs would be deleted.
    """
    for name in ("run.json", "result.json"):  # a kill cut their writing short
        for path in folder.glob(f".{name}.*"):
            path.unlink(missing_ok=True)
    try:
        found = json.loads((folder / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    checkpoints = (folder / "checkpoints").glob("step-*")
    made = ("model", "result.json", "sampled")
    has_progress = any(checkpoints) or any((folder / name).exists() for name in made)
    if found is None and any(folder.iterdir()) and not force:
        raise FileExistsError(
            f"{folder} exists and holds other things; choose another --output, or "
            "--force to use it (files of other names stay)"
        )
    if found is not None and found != wanted and has_progress and not force:
        keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        what = f"with {keys[0]} = {found.get(keys[0])}, not {wanted.get(keys[0])}"
        if keys[0] == "command":
            what = f"of `{found.get('command')}`"
        elif keys[0].startswith("source."):
            what = "on other files, or on files that have changed since"
        raise FileExistsError(
            f"{folder} holds a run {what}; choose another --output, or --force to "
            "delete it and start anew"
        )
    if found != wanted:
        keep_inputs(folder, inputs)
        for name in OWN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_json(folder / "run.json", wanted)


def keep_inputs(folder: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to delete what a run is to read.

    Raises:
        ValueError: if an input lies in what belongs to a run in the folder.
    """
    own = [(folder / name).resolve() for name in OWN]
    for key, value in inputs.items():
        for name in filter(lambda one: isinstance(one, str), as_list(value)):
            path = Path(name).resolve()
            if any(path.is_relative_to(one) for one in own):
                raise ValueError(
                    f"{key} {name} is in {folder}, where another run is to be deleted; "
                    "choose another --output"
                )
