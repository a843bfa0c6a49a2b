"""`llama2-lite pretrain`: a Llama from the town or from files of one's own."""

import difflib
import json
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from llama2_lite.corpus import (
    TokenDataset,
    clean_documents,
    drop_duplicates,
    write_shards,
)
from llama2_lite.model import Llama
from llama2_lite.pretraining import (
    PretrainingModule,
    TokenDataModule,
    best_precision,
)
from llama2_lite.runtime.artifacts import artifact, write_json
from llama2_lite.runtime.configs import find_config, read_yaml
from llama2_lite.runtime.documents import hold_out, matching_files, read_documents
from llama2_lite.runtime.progress import (
    Samples,
    TrainingProgress,
    make_console,
    write_on,
)
from llama2_lite.runtime.training import (
    bits_per_character,
    evaluate_loss,
    fit,
    prepare_process,
    trainer_parts,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import DEFAULT_DOCUMENTS, build_town

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


class TextDataModule(TokenDataModule):
    """Documents of the town or of files, with a tokenizer, as shards.

    Args:
        folder: where tokenizer and shards go.
        files: paths or globs of .txt, .jsonl, .jsonl.gz and .parquet files; the
            built-in town if left out.
        text_field: the JSON key or Parquet column with the text.
        town_documents: how many, if there are no files.
        tokenizer: a SentencePiece model to use; one is trained if left out.
        vocab_size: of the tokenizer that is trained.
        validation_fraction: of the text, at its end, that is held out.
        lengths: (share of the batches, sequence length, windows of a batch over all
            processes), in order.
        validation_windows: at most so many for the losses while training; the final
            figures use all.
        seed: of the order of the windows.
    """

    def __init__(
        self,
        folder: Path,
        files: list[str] | None = None,
        text_field: str = "text",
        town_documents: int = DEFAULT_DOCUMENTS,
        tokenizer: str | None = None,
        vocab_size: int = 1024,
        validation_fraction: float = 0.1,
        lengths: list[tuple[float, int, int]] = [(1.0, 256, 16)],  # noqa: B006
        validation_windows: int = 64,
        seed: int = 0,
    ):
        corpus = Path(folder) / "corpus"
        super().__init__(
            corpus / "train", corpus / "validation", lengths, validation_windows, seed
        )
        if not 0 < validation_fraction < 1:
            raise ValueError(f"{validation_fraction=} must be between 0 and 1")
        self.folder = Path(folder)
        self.files = files
        self.text_field = text_field
        self.town_documents = town_documents
        self.given_tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.validation_fraction = validation_fraction

    def source(self) -> dict[str, Any]:
        """What the text depends on, as JSON values."""
        if self.files is None:
            return {"town_documents": self.town_documents}
        files = {path for pattern in self.files for path in matching_files(pattern)}
        stamps = [(path, path.stat()) for path in sorted(files)]
        return {
            "files": [[str(p), stat.st_size, stat.st_mtime_ns] for p, stat in stamps],
            "text_field": self.text_field,
            "validation_fraction": self.validation_fraction,
        }

    def documents(self) -> Iterator[str]:
        """All documents of the files, cleaned, each once."""
        documents = read_documents(self.files or [], self.text_field)
        return drop_duplicates(clean_documents(documents))

    def split(self) -> tuple[Iterable[str], Iterable[str]]:
        """Documents for training and for validation."""
        if self.files is not None:
            return hold_out(self.documents, self.validation_fraction)
        town = build_town()
        held_out = max(1, round(self.town_documents * self.validation_fraction))
        return (
            (document.text for document in town.documents(self.town_documents)),
            (document.text for document in town.documents(held_out, seed=1)),
        )

    def prepare_data(self) -> None:
        """Make tokenizer and shards, unless they are there; one process does it."""
        given = self.given_tokenizer and Tokenizer(self.given_tokenizer)
        config = {
            "source": self.source(),
            "tokenizer": given.sha256 if given else self.vocab_size,
        }
        modules = ["corpus", "tokenizer", "town", "runtime.documents"]
        artifact(self.folder, "corpus", config, [], modules, self._write)

    def _write(self, folder: Path) -> None:
        path = folder / "tokenizer.model"
        if self.given_tokenizer:
            shutil.copy(self.given_tokenizer, path)
        else:
            train_tokenizer(self.split()[0], path, self.vocab_size)
        tokenizer = Tokenizer(path)
        for name, documents in zip(("train", "validation"), self.split(), strict=True):
            shutil.rmtree(folder / name, ignore_errors=True)
            write_shards(documents, tokenizer, folder / name)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer, once `prepare_data` has run."""
        return Tokenizer(self.folder / "corpus" / "tokenizer.model")


def choose_vocab_size(tokenizer: str | None, vocab_size: int) -> int:
    """The vocabulary of the given tokenizer, else of the one to be trained."""
    return Tokenizer(tokenizer).vocab_size if tokenizer else vocab_size


class Pretrain(LightningCLI):
    """The command line: Lightning's trainer, the pretraining module, and the text."""

    def __init__(self, arguments: list[str]):
        self.console = make_console()
        super().__init__(
            PretrainingModule,
            TextDataModule,
            save_config_callback=None,
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
        """Lightning's trainer with our parts; the configuration may change some."""
        config, data = self.config, self.datamodule
        given = {k: v for k, v in self.config_init.trainer.items() if v is not None}
        parts = trainer_parts(
            config.output,
            config.output / "model",
            data.tokenizer,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            callbacks=[
                *given.pop("callbacks", []),
                TrainingProgress("pretrain", self.console),
                Samples(data.tokenizer, config.prompts, self.console),
            ],
            loggers=[TensorBoardLogger(config.output, name="logs", version="")],
        )
        parts["plugins"] += given.pop("plugins", [])
        return Trainer(**{**given, **parts})


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


def explain(message: str, parser: LightningArgumentParser) -> str:
    """One sentence for a parser's complaint; for an unknown key, the nearest ones."""
    group = re.search(r"Group '(.*)' does not accept option '(.*)'", message)
    unknown = re.search(r"Option '(.*)' is not accepted", message)
    argument = re.search(r"unrecognized arguments: (\S+)", message)
    if group or unknown or argument:
        key = ".".join(group.groups()) if group else (unknown or argument)[1]  # type: ignore[index]
        if argument and not key.startswith("-"):
            return f"what is {key!r} for? Every value belongs to a --key"
        key = key.lstrip("-").partition("=")[0]
        keys = [action.dest for action in parser._actions]
        near = difflib.get_close_matches(key, keys, 3, 0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        return f"there is no key {key!r}{hint}"
    if expected := re.search(r'Parser key "(.*)":\s*(.*)', message, re.DOTALL):
        return f"{expected[1]}: {expected[2]}"
    if required := re.search(r'Key "(.*)" is required', message):
        return f"{required[1]} is missing: give --{required[1]} or a --config with it"
    return re.sub(r"Call to compute_fn of link .* failed: ", "", message)


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
