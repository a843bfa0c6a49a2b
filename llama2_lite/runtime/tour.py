"""`llama2-lite tour`: the whole road on the built-in town, stage by stage.

Each stage is an artifact in the folder of the tour: made once, found again by the
chapters, and made anew when its recipe or code changes.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer

from llama2_lite.chat import INSTRUCTION, SYSTEM
from llama2_lite.corpus import TokenDataset, write_shards
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import (
    PretrainingModule,
    TokenDataModule,
    best_precision,
)
from llama2_lite.runtime.artifacts import (
    PACKAGE,
    Artifact,
    artifact,
    machine_name,
    write_json,
)
from llama2_lite.runtime.configs import read_recipe
from llama2_lite.runtime.progress import (
    Samples,
    TrainingProgress,
    follow,
    make_console,
)
from llama2_lite.runtime.report import check_knowledge, print_report
from llama2_lite.runtime.text_data import town_lists
from llama2_lite.runtime.training import (
    Clock,
    bits_per_character,
    compile_blocks,
    evaluate_loss,
    fit,
    prepare_process,
    trainer_parts,
)
from llama2_lite.tokenizer import Tokenizer, train_tokenizer
from llama2_lite.town import Document, Town, build_town, system_instructions

HELD_OUT_SEED = 10**6  # added to a seed: other documents of the same kinds
PROMPTS = ["", "Question:", "Once"]


@dataclass(frozen=True)
class Recipe:
    """What the tour makes; configs/tour.yaml has the values.

    Attributes:
        documents: of the town, to train on.
        validation_documents: others, to measure the loss on.
        vocab_size: of the tokenizer.
        model: name of a size, see `LlamaConfig.preset`.
        model_overrides: entries of that size to change.
        max_steps: of pretraining.
        peak_lr, warmup: see `PretrainingModule`.
        lengths: (share of the batches, sequence length, windows of a batch).
        compile: whether to compile the blocks.
        validate_every, checkpoint_every: in steps.
    """

    documents: int
    validation_documents: int
    vocab_size: int
    model: str
    max_steps: int
    peak_lr: float
    warmup: int
    lengths: list[list[Any]]
    validate_every: int
    checkpoint_every: int
    compile: bool = False
    model_overrides: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path | None = None) -> "Recipe":
        """Read a YAML file, by default the one of the package.

        Raises:
            ValueError: if it is not YAML, or a key is missing or unknown.
        """
        return read_recipe(cls, "tour", path)

    def llama(self) -> LlamaConfig:
        """The sizes of the model."""
        return LlamaConfig.preset(
            self.model, vocab_size=self.vocab_size, **self.model_overrides
        )


class Stages:
    """The stages of the tour, each made when it is asked for and not there.

    Args:
        folder: of the tour.
        recipe: what to make.
        seed: of the documents, the weights and the order of the data. The town itself
            stays the same.
    """

    def __init__(self, folder: str | Path, recipe: Recipe, seed: int = 0):
        self.folder = Path(folder)
        self.recipe = recipe
        self.seed = seed
        self.console = make_console()
        self.town: Town = build_town()

    def documents(self, n_documents: int, seed: int) -> list[Document]:
        """Documents of the town, with a bar."""
        documents = self.town.documents(n_documents, seed=seed)
        return list(follow(documents, n_documents, "documents", self.console))

    def say(self, text: str) -> None:
        self.console.print(f"[bold]{text}[/]")

    def tokenizer(self) -> Artifact:
        """``tokenizer/tokenizer.model``, learnt from the documents."""
        recipe = self.recipe
        config = {
            "documents": recipe.documents,
            "vocab_size": recipe.vocab_size,
            "seed": self.seed,
            "lists": town_lists(),
            "tags": [*INSTRUCTION, *SYSTEM],
        }

        def build(folder: Path) -> None:
            started = time.perf_counter()
            self.say(f"tokenizer: learning {recipe.vocab_size:,} pieces")
            documents = self.documents(recipe.documents, self.seed)
            texts = [document.text for document in documents]
            texts += written_requests(self.town)
            train_tokenizer(texts, folder / "tokenizer.model", recipe.vocab_size)
            note_seconds(folder, time.perf_counter() - started)

        modules = ["town", "tokenizer"]
        return artifact(self.folder, "tokenizer", config, [], modules, build)

    def corpus(self) -> Artifact:
        """``corpus/train`` and ``corpus/validation``, shards of tokens."""
        made = self.tokenizer()
        recipe = self.recipe
        config = {
            "documents": recipe.documents,
            "validation_documents": recipe.validation_documents,
            "seed": self.seed,
        }

        def build(folder: Path) -> None:
            started = time.perf_counter()
            self.say(f"corpus: {recipe.documents:,} documents of the town")
            tokenizer = Tokenizer(made.path / "tokenizer.model")
            for name, n_documents, seed in [
                ("train", recipe.documents, self.seed),
                ("validation", recipe.validation_documents, self.seed + HELD_OUT_SEED),
            ]:
                documents = self.documents(n_documents, seed)
                shutil.rmtree(folder / name, ignore_errors=True)
                texts = (document.text for document in documents)
                write_shards(texts, tokenizer, folder / name)
            bits = sum(document.bits for document in documents)
            n_characters = sum(len(document.text) for document in documents)
            write_json(folder / "estimate.json", {"bits": bits / n_characters})
            note_seconds(folder, time.perf_counter() - started)

        return artifact(self.folder, "corpus", config, [made], ["corpus"], build)

    def base(self) -> Artifact:
        """``base``: the pretrained model, with its tokenizer and its logs."""
        corpus, made = self.corpus(), self.tokenizer()
        recipe = self.recipe
        training = ("max_steps", "peak_lr", "warmup", "lengths", "compile")
        config = {name: getattr(recipe, name) for name in training}
        config |= {"llama": asdict(recipe.llama()), "seed": self.seed}

        def build(folder: Path) -> None:
            self._train(folder, corpus, Tokenizer(made.path / "tokenizer.model"))

        modules = ["layers", "attention", "model", "pretraining", "corpus"]
        return artifact(self.folder, "base", config, [corpus], modules, build)

    def _train(self, folder: Path, corpus: Artifact, tokenizer: Tokenizer) -> None:
        """Pretrain in a folder, and leave a model and its logs there."""
        recipe, clock = self.recipe, Clock()
        if (folder / "seconds.json").is_file():  # stopped while cleaning up
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return
        config = recipe.llama()
        self.say(f"base: pretraining {config.parameter_count():,} parameters")
        lengths = [tuple(length) for length in recipe.lengths]
        data = TokenDataModule(
            corpus.path / "train",
            corpus.path / "validation",
            lengths,
            validation_windows=32,
            seed=self.seed,
        )
        keywords: dict[str, Any] = {"lay_out": compile_blocks} if recipe.compile else {}
        module = PretrainingModule(
            config, recipe.peak_lr, recipe.warmup, seed=self.seed, **keywords
        )
        parts = trainer_parts(
            folder,
            folder,
            lambda: tokenizer,
            checkpoint_every=recipe.checkpoint_every,
            callbacks=[
                TrainingProgress("base", self.console),
                Samples(lambda: tokenizer, PROMPTS, self.console),
                clock,
            ],
        )
        trainer = Trainer(
            **parts,
            max_steps=recipe.max_steps,
            val_check_interval=recipe.validate_every,
            log_every_n_steps=10,
            precision=best_precision(),
        )
        fit(trainer, module, data, folder, self.say)
        note_seconds(folder, clock.elapsed())
        shutil.rmtree(folder / "checkpoints")

    def evaluation(self) -> Artifact:
        """``evaluation/report.json``: what the base model knows."""
        base, corpus, made = self.base(), self.corpus(), self.tokenizer()

        def build(folder: Path) -> None:
            self.say("evaluation: facts and sums")
            report = self._report(base, corpus, made)
            write_json(folder / "report.json", report)

        modules = ["generation", "town", "runtime.report", "runtime.tour"]
        inputs = [base, corpus]
        return artifact(self.folder, "evaluation", {}, inputs, modules, build)

    def _report(self, base: Artifact, corpus: Artifact, made: Artifact) -> Any:
        started = time.perf_counter()
        model = Llama.from_pretrained(base.path)
        length = max(length for _, length, _ in self.recipe.lengths)
        held_out = TokenDataset(corpus.path / "validation", length)
        loss = evaluate_loss(model, held_out, batch_size=8)
        right = check_knowledge(
            model, Tokenizer(made.path / "tokenizer.model"), self.town
        )
        stages = {"tokenizer": made, "corpus": corpus, "base": base}
        seconds = {name: read_seconds(stage.path) for name, stage in stages.items()}
        seconds["evaluation"] = time.perf_counter() - started
        return {
            "parameters": model.config.parameter_count(),
            "training_tokens": self._n_tokens(),
            "loss": loss,
            "bits_per_character": bits_per_character(loss, held_out),
            "estimate": json.loads((corpus.path / "estimate.json").read_text())["bits"],
            "right": right,
            "tokens_per_second": self._n_tokens() / seconds["base"],
            "minutes": {name: value / 60 for name, value in seconds.items()},
            "seed": self.seed,
            "machine": machine_name(),
        }

    def _n_tokens(self) -> int:
        steps = self.recipe.max_steps
        shares = self.recipe.lengths
        return sum(
            round(share * steps) * length * rows for share, length, rows in shares
        )


def written_requests(town: Town) -> Iterator[str]:
    """Requests and answers in the format of dialogues, every third with instructions.

    For the tokenizer, so that the tags of the format become few pieces.
    """
    instructions = cycle(system_instructions("train"))
    for number, task in enumerate(town.tasks("train")):
        request = task.prompt
        if number % 3 == 0:
            request = SYSTEM[0] + next(instructions).text + SYSTEM[1] + request
        yield f"{INSTRUCTION[0]} {request} {INSTRUCTION[1]} {task.reference} "


def note_seconds(folder: Path, seconds: float) -> None:
    """Remember how long a stage took."""
    write_json(folder / "seconds.json", seconds)


def read_seconds(folder: Path) -> float:
    """How long a stage took."""
    return float(json.loads((folder / "seconds.json").read_text()))


def default_folder() -> Path:
    """``runs/tour`` of the repository, or of this folder where there is none."""
    is_repository = (PACKAGE.parent / "pyproject.toml").is_file()
    return (PACKAGE.parent if is_repository else Path.cwd()) / "runs" / "tour"


def tour_artifacts(
    folder: str | Path | None = None,
    seed: int = 0,
    recipe: str | Path | None = None,
) -> dict[str, Path]:
    """The folders of the tour's stages, made where they are missing.

    Args:
        folder: of the tour; the repository's ``runs/tour`` if left out.
        seed: see `Stages`.
        recipe: a YAML file; configs/tour.yaml if left out.
    """
    prepare_process()
    stages = Stages(folder or default_folder(), Recipe.read(recipe), seed)
    made = (stages.tokenizer(), stages.corpus(), stages.base())
    return {stage.path.name: stage.path for stage in made}


def base_model() -> Path:
    """The folder of the tour's base model, trained first if it is not there."""
    return tour_artifacts()["base"]


def tour(
    folder: str | Path, seed: int = 0, recipe: str | Path | None = None
) -> dict[str, Any]:
    """Make all stages, print the table and write ``report.json``."""
    prepare_process()
    stages = Stages(folder, Recipe.read(recipe), seed)
    report = json.loads((stages.evaluation().path / "report.json").read_text())
    write_json(stages.folder / "report.json", report)
    print_report(report, stages.folder)
    return report
