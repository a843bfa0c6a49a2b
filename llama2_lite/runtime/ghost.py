"""The stages of Ghost Attention: a chat model learns to keep to what it is told.

First the model learns to obey an instruction in the turn at hand, from written answers;
then to keep to it, from its own replies.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from llama2_lite.chat import Dialog, DialogBatch, Example, collate, encode_dialog
from llama2_lite.ghost_attention import (
    GhostAttentionModule,
    GhostDataset,
    GhostDialog,
    build_dialogs,
    chat_about,
    deal_instructions,
    draw_tasks,
)
from llama2_lite.model import Llama
from llama2_lite.pretraining import MixedLengthLoader
from llama2_lite.runtime.alignment import AlignmentStages
from llama2_lite.runtime.artifacts import Artifact, write_json
from llama2_lite.runtime.training import precision
from llama2_lite.sft import SupervisedModule
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Town, system_instructions


@dataclass(frozen=True)
class GhostRecipe:
    """Numbers of Ghost Attention.

    Attributes:
        start: the stage before.
        demonstrations: written answers that obey in their one turn.
        rows: of them in a batch.
        told_lr: learning rate of this.
        dialogs: (number, turns) of the dialogues to keep to an instruction in.
        lengths: (share of the batches, tokens of a dialogue at most, dialogues of a
            batch).
        combined: share of instructions that come with another.
        temperature: of all replies.
        steps, lr, warmup: of the training.
    """

    start: str = "sft"
    demonstrations: int = 4000
    rows: int = 16
    told_lr: float = 1e-3
    dialogs: tuple[tuple[int, int], ...] = ((176, 8), (88, 20))
    lengths: tuple[tuple[float, int, int], ...] = ((0.5, 330, 5), (0.5, 900, 2))
    combined: float = 0.15
    temperature: float = 0.6
    steps: int = 260
    lr: float = 1e-3
    warmup: int = 20


RECIPE = GhostRecipe()
DIALOGS = "dialogs.json"
MODULES = ("town", "chat", "sft", "ghost_attention", "runtime.ghost")


def told_demonstrations(
    town: Town, n: int, combined: float = 0.15, seed: int = 0
) -> list[Dialog]:
    """Requests of one turn with an instruction, and a good answer that obeys it.

    Of the instructions, those held out from Ghost Attention are among them: what they
    ask for has to be known, if not to be remembered.
    """
    random = Random(f"told {seed}")
    instructions = [
        one for split in ("train", "held_out") for one in system_instructions(split)
    ]
    dealt = deal_instructions(instructions, combined, random)
    dialogs: list[Dialog] = []
    for task in draw_tasks(town.tasks("train"), n, random):
        instruction = next(dealt)
        text = random.choice([instruction.text, instruction.short])
        turn: Dialog = task.dialog(instruction.apply(task.reference))
        dialogs.append([{"role": "system", "content": text}, *turn])
    return dialogs


class Rows:
    """Dialogues as batches of rows of like length, one in each row: no mask is needed.

    Args:
        examples: from `encode_dialog`.
        seed: of the order.
    """

    def __init__(self, examples: Sequence[Example], seed: int = 0):
        self.examples, self.seed = list(examples), seed
        self.sequence_length = max(len(example.ids) for example in examples)
        self.n_tokens = sum(len(example.ids) for example in examples)

    def __len__(self) -> int:
        """Dialogues in an epoch."""
        return len(self.examples)

    def batch(
        self, step: int, batch_size: int, rank: int = 0, world_size: int = 1
    ) -> DialogBatch:
        """The rows of one process at one step: a function of the step alone."""
        size = batch_size * world_size
        per_epoch = max(1, len(self) // size)
        epoch, place = divmod(step, per_epoch)
        random = Random(f"rows {self.seed} {epoch}")
        order = random.sample(range(len(self)), len(self))
        batches: list[list[int]] = []
        for start in range(0, len(order), 50 * size):
            some = order[start : start + 50 * size]
            some.sort(key=lambda number: len(self.examples[number].ids))
            batches += [some[i : i + size] for i in range(0, len(some), size)]
        batches = [rows for rows in batches if len(rows) == size] or batches
        random.shuffle(batches)
        rows = batches[place][rank::world_size]
        return collate([[self.examples[number]] for number in rows])


class Served(LightningDataModule):
    """Datasets of several lengths for a trainer.

    Args:
        datasets: one for each length.
        shares: of the batches.
        batch_sizes: over all processes.
        held_out: batches to measure the loss on.
    """

    def __init__(
        self,
        datasets: list[Any],
        shares: list[float],
        batch_sizes: list[int],
        held_out: list[Any],
    ):
        super().__init__()
        self.datasets, self.shares, self.batch_sizes = datasets, shares, batch_sizes
        self.held_out = held_out

    def train_dataloader(self) -> MixedLengthLoader:
        """Batches without end."""
        return MixedLengthLoader(self.datasets, self.shares, self.batch_sizes)

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out batches."""
        return DataLoader(self.held_out, batch_size=None)  # type: ignore[arg-type]


def told_data(
    town: Town, tokenizer: Tokenizer, recipe: GhostRecipe, seed: int = 0
) -> Served:
    """What the first stage learns."""
    n_held_out = 4 * recipe.rows
    dialogs = told_demonstrations(
        town, recipe.demonstrations + n_held_out, recipe.combined, seed
    )
    examples = [encode_dialog(dialog, tokenizer) for dialog in dialogs]
    held_out = Rows(examples[:n_held_out])
    batches = [held_out.batch(step, recipe.rows) for step in range(4)]
    return Served([Rows(examples[n_held_out:], seed)], [1.0], [recipe.rows], batches)


def sample_ghosts(
    model: Llama, tokenizer: Tokenizer, town: Town, recipe: GhostRecipe, seed: int = 0
) -> list[GhostDialog]:
    """Dialogues with replies of the model to be trained."""
    made: list[GhostDialog] = []
    tasks, told = town.tasks("train"), system_instructions("train")
    for number, (n_dialogs, n_turns) in enumerate(recipe.dialogs):
        how: dict[str, Any] = {"temperature": recipe.temperature}
        how["seed"] = 10 * seed + number
        with precision():
            said = chat_about(model, tokenizer, tasks, n_dialogs, n_turns, **how)
            made += build_dialogs(
                model,
                tokenizer,
                said,
                told,
                combined=recipe.combined,
                context=1,
                **how,
            )
    return made


def ghost_data(
    ghosts: Sequence[GhostDialog],
    tokenizer: Tokenizer,
    recipe: GhostRecipe,
    seed: int = 0,
    kind: Any = GhostDataset,
) -> Served:
    """What the second stage learns: the beginnings of all dialogues, and long ones.

    One dialogue in fifty is held out.
    """
    shares, lengths, sizes = map(list, zip(*recipe.lengths, strict=True))
    train = [ghost for number, ghost in enumerate(ghosts) if number % 50]
    held_out = GhostDataset(ghosts[::50], tokenizer, max(lengths))
    batches = [held_out.batch(step, 1) for step in range(len(held_out))]
    datasets = [kind(train, tokenizer, length, seed=seed) for length in lengths]
    return Served(datasets, shares, sizes, batches)


def told(stages: AlignmentStages, recipe: GhostRecipe = RECIPE) -> Artifact:
    """``told``: a chat model that obeys an instruction in the turn at hand."""
    start = getattr(stages, recipe.start)()

    @stages.stage("told", asdict(recipe), [start], *MODULES)
    def made(folder: Path) -> None:
        data = told_data(stages.town, stages.tokenizer(), recipe, stages.seed)
        module = SupervisedModule(start.path, recipe.told_lr, separate=False)
        n_steps = recipe.demonstrations // recipe.rows
        stages.train(folder, "told", module, data, n_steps)

    return made


def read_ghosts(folder: Path) -> list[GhostDialog]:
    """The dialogues that the stage ``ghost`` was trained on."""
    records = json.loads((folder / DIALOGS).read_text("utf-8"))
    return [GhostDialog(*record) for record in records]


def ghost(stages: AlignmentStages, recipe: GhostRecipe = RECIPE) -> Artifact:
    """``ghost``: a chat model that keeps to an instruction for a whole dialogue."""
    start = told(stages, recipe)

    @stages.stage("ghost", asdict(recipe), [start], *MODULES, "generation")
    def made(folder: Path) -> None:
        tokenizer = stages.tokenizer()
        stages.stages.say("ghost: dialogues, and replies that obey")
        model = Llama.from_pretrained(start.path)
        if not (folder / DIALOGS).is_file():
            sampled = sample_ghosts(model, tokenizer, stages.town, recipe, stages.seed)
            write_json(folder / DIALOGS, sampled)
        ghosts = read_ghosts(folder)
        data = ghost_data(ghosts, tokenizer, recipe, stages.seed)
        module = GhostAttentionModule(start.path, recipe.lr, recipe.warmup)
        stages.train(folder, "ghost", module, data, recipe.steps)

    return made
