"""`llama2-lite pretrain`: a Llama from the town or from files of one's own."""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from llama2_lite.corpus import (
    TokenDataset,
)
from llama2_lite.model import Llama
from llama2_lite.pretraining import (
    PretrainingModule,
    best_precision,
)
from llama2_lite.runtime.artifacts import write_json
from llama2_lite.runtime.configs import explain, find_config, read_yaml
from llama2_lite.runtime.progress import (
    Samples,
    TrainingProgress,
    make_console,
    write_on,
)
from llama2_lite.runtime.text_data import TextDataModule, choose_vocab_size
from llama2_lite.runtime.training import (
    TRAINER_DEFAULTS,
    bits_per_character,
    evaluate_loss,
    fit,
    prepare_process,
    trainer_parts,
)

# What belongs to a run in its folder; everything else there is somebody else's.
OWN = (
    "config.yaml",
    "run.json",
    "result.json",
    "corpus",
    "checkpoints",
    "logs",
    "model",
)


class Pretrain(LightningCLI):
    """The command line: Lightning's trainer, the pretraining module, and the text."""

    def __init__(self, arguments: list[str]):
        self.console = make_console()
        super().__init__(
            PretrainingModule,
            TextDataModule,
            save_config_callback=None,
            trainer_defaults=TRAINER_DEFAULTS,
            parser_kwargs={"exit_on_error": False, "prog": "llama2-lite pretrain"},
            args=arguments,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What belongs to no class."""
        add = parser.add_argument
        add("--output", type=Path, default="runs/pretrain", help="Folder of the run.")
        add("--seed", type=int, default=0, help="Of the weights and the data.")
        add("--checkpoint_every", type=int, default=500, help="Steps between them.")
        add("--keep_checkpoints", type=int, default=2, help="How many stay.")
        add("--prompts", type=list[str], default=[""], help="What samples continue.")
        add("--sample_tokens", type=int, default=200, help="Length of a sample.")
        add("--force", action="store_true", help="Start anew in a folder that is used.")

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What follows from something else."""
        parser.link_arguments("seed", "model.seed")
        parser.link_arguments("seed", "data.seed")
        parser.link_arguments("output", "data.folder")
        parser.link_arguments(
            ("data.tokenizer", "data.vocab_size"),
            "model.config.vocab_size",
            compute_fn=choose_vocab_size,
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and turn each error into one that names the key and its neighbours."""
        try:
            self.config = parser.parse_args(with_config_paths(args))
        except Exception as error:
            raise ValueError(explain(str(error), parser)) from None

    def _set_seed(self) -> None:
        seed_everything(self.config.seed, verbose=False)

    def before_instantiate_classes(self) -> None:
        """Choose what the configuration leaves open."""
        if self.config.trainer.precision is None:
            self.config.trainer.precision = best_precision()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Lightning's trainer with our parts, to which the configuration may add."""
        config, data = self.config, self.datamodule
        given = {k: v for k, v in self.config_init.trainer.items() if v is not None}
        parts = trainer_parts(
            config.output,
            config.output / "model",
            data.tokenizer,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            callbacks=[
                *as_list(given.pop("callbacks", [])),
                TrainingProgress("pretrain", self.console),
                Samples(data.tokenizer, config.prompts, self.console),
            ],
            loggers=[
                TensorBoardLogger(config.output, name="logs", version=""),
                *as_list(given.pop("logger", [])),
            ],
        )
        parts["plugins"] += as_list(given.pop("plugins", []))
        return Trainer(**{**parts, **given})


def as_list(value: Any) -> list[Any]:
    """One or several; yes and no are none, as ours are there in any case."""
    if isinstance(value, bool):
        return []
    return value if isinstance(value, list) else [value]


def with_config_paths(arguments: list[str]) -> list[str]:
    """Arguments in which each ``--config NAME`` is a path to a readable file."""
    found: list[str] = []
    previous = ""
    for argument in arguments:
        if previous in ("--config", "-c"):
            argument = str(find_config(argument))
            read_yaml(argument)  # for the sake of its errors
        elif argument.startswith("--config="):
            argument = f"--config={find_config(argument.partition('=')[2])}"
            read_yaml(argument.partition("=")[2])
        found.append(argument)
        previous = argument
    return found


def run(arguments: list[str]) -> None:
    """Train as the arguments say, or go on with what they began."""
    prepare_process()
    command = Pretrain(arguments)
    config, data, trainer = command.config, command.datamodule, command.trainer
    folder, say = Path(config.output), command.console.print
    if trainer.is_global_zero:
        claim_folder(folder, describe_run(command), config.force)
        (folder / "config.yaml").write_text(command.parser.dump(config), "utf-8")
    fit(trainer, command.model, data, folder, say)
    if trainer.is_global_zero:
        finish(folder, data, config.prompts, config.sample_tokens)


def describe_run(command: Pretrain) -> dict[str, Any]:
    """What decides the result of a run, key by key, as JSON values."""
    config = yaml.safe_load(command.parser.dump(command.config))
    keys = ("max_steps", "accumulate_grad_batches", "precision")
    for name in ("folder", "files"):  # what the files are is in the source
        config["data"].pop(name, None)
    kept = {
        "model": config["model"],
        "data": config["data"],
        "seed": config["seed"],
        "trainer": {key: config["trainer"][key] for key in keys},
        "source": command.datamodule.source(),
    }
    return json.loads(json.dumps(flatten(kept)))


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def claim_folder(folder: Path, wanted: dict[str, Any], force: bool) -> None:
    """Make sure that a folder is empty or holds this very run.

    Raises:
        FileExistsError: if it holds anything else and ``force`` is not given.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a folder")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        found = json.loads((folder / "run.json").read_text("utf-8"))
    except (OSError, ValueError):
        found = None
    has_progress = any((folder / "checkpoints").glob("step-*"))
    if found is None and any(folder.iterdir()) and not force:
        raise FileExistsError(
            f"{folder} exists and holds other things; choose another --output, or "
            "--force to use it (files of other names stay)"
        )
    if found is not None and found != wanted and has_progress and not force:
        keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
        raise FileExistsError(
            f"{folder} holds a run with {keys[0]} = {found.get(keys[0])}, not "
            f"{wanted.get(keys[0])}; choose another --output, or --force to start anew"
        )
    if found != wanted:
        for name in OWN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_json(folder / "run.json", wanted)


def finish(
    folder: Path, data: TextDataModule, prompts: list[str], n_tokens: int
) -> None:
    """Show what the best model writes, and measure it on all of the held-out text."""
    model = Llama.from_pretrained(folder / "model")
    tokenizer = data.tokenizer()
    for prompt in prompts:
        print(f"\n{write_on(model, tokenizer, prompt, n_tokens)}")
    length = max(length for _, length, _ in data.lengths)
    held_out = TokenDataset(data.validation, length, verify=False)
    loss = evaluate_loss(model, held_out)
    bits = bits_per_character(loss, held_out)
    figures = {
        "validation_loss": loss,
        "bits_per_character": bits,
        "parameters": model.config.parameter_count(),
    }
    write_json(folder / "result.json", figures)
    print(
        f"\nvalidation loss {loss:.4f} nats per token, {bits:.4f} bits per character; "
        f"the model is in {folder / 'model'}"
    )
