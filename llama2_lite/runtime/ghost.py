"""Ghost Attention for the tour: dialogues, how they are served, what came of it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2_lite.chat import Dialog
from llama2_lite.ghost_attention import (
    GhostDataset,
    GhostDialog,
    build_dialogs,
    chat_about,
    converse,
    count_obeyed,
    plan_visits,
)
from llama2_lite.model import Llama
from llama2_lite.ppo import ScoreBoth
from llama2_lite.runtime.batches import Served
from llama2_lite.runtime.judge import Share, share
from llama2_lite.runtime.training import precision
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Town, system_instructions


@dataclass(frozen=True)
class GhostRecipe:
    """Numbers of Ghost Attention.

    Attributes:
        dialogs: (number, turns) of the dialogues to keep to an instruction in.
        lengths: (share of the batches, tokens of a dialogue at most, dialogues of a
            batch).
        combined: share of instructions that come with another.
        plain: share of dialogues without an instruction.
        temperature: of all replies.
        steps, lr, warmup: of the training.
    """

    dialogs: list[list[int]]
    lengths: list[list[Any]]
    combined: float
    plain: float
    temperature: float
    steps: int
    lr: float
    warmup: int


DIALOGS = "dialogs.json"
BATCH = 256
SINGLE = 200  # tokens that a single turn has at most
MANY = 10  # turns
TURNS = (1, 2, 4, 6, 10, 20)
SHORT = ("fact", "sum", "opposite")  # twenty of them fit into the context
LENGTH = 900  # tokens, if all are well answered


def sample_ghosts(
    model: Llama, tokenizer: Tokenizer, town: Town, recipe: GhostRecipe, seed: int = 0
) -> list[GhostDialog]:
    """Dialogues with replies of the model to be trained.

    There is nothing to remember in those of one turn; so they have all instructions,
    also those that are held out, which would be unlearned without them. Those of many
    turns ask what is short, so that the last turns are within the context.
    """
    made: list[GhostDialog] = []
    held_out = system_instructions("held_out")
    for number, (n_dialogs, n_turns) in enumerate(recipe.dialogs):
        told = system_instructions("train") + (held_out if n_turns == 1 else [])
        tasks = town.tasks("train", (*SHORT, "unsafe") if n_turns > MANY else None)
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
                plain=recipe.plain,
                context=1,
                **how,
            )
    return made


def drop_unsafe(
    ghosts: Sequence[GhostDialog], score_both: ScoreBoth
) -> list[GhostDialog]:
    """Leave out replies that the safety model finds unsafe more likely than not.

    Fine-tuning on a model's own answers repeats what is bad in them. What GAtt draws is
    therefore judged once more by the reward that the model was trained with.
    """
    asked: list[tuple[GhostDialog, int]] = []
    prompts: list[Dialog] = []
    texts: list[str] = []
    for ghost in ghosts:
        system = [{"role": "system", "content": ghost.instruction}]
        for k, reply in enumerate(ghost.replies):
            if reply is not None:
                asked.append((ghost, k))
                prompts.append(
                    [*(system if ghost.instruction else []), ghost.dialog[2 * k]]
                )
                texts.append(reply)
    for start in range(0, len(asked), BATCH):
        rows = slice(start, start + BATCH)
        _, safety = score_both(prompts[rows], texts[rows])
        for (ghost, k), is_safe in zip(asked[rows], safety > 0, strict=True):
            if not is_safe:
                ghost.replies[k] = None
    return list(ghosts)


def ghost_data(
    ghosts: Sequence[GhostDialog],
    tokenizer: Tokenizer,
    recipe: GhostRecipe,
    seed: int = 0,
    kind: Any = GhostDataset,
) -> Served:
    """What is learned: single turns, the beginnings of dialogues, and long ones.

    One dialogue in fifty is held out.
    """
    shares, lengths, sizes = map(list, zip(*recipe.lengths, strict=True))
    held_out = GhostDataset(ghosts[::50], tokenizer, max(lengths))
    batches = [held_out.batch(step, 1) for step in range(len(held_out))]
    train = [ghost for number, ghost in enumerate(ghosts) if number % 50]
    single, longer = (
        [ghost for ghost in train if (len(ghost.replies) == 1) == is_single]
        for is_single in (True, False)
    )
    datasets = [
        kind(longer if length > SINGLE else single, tokenizer, length, seed=seed)
        for length in lengths
    ]
    return Served(datasets, shares, sizes, batches)


def read_ghosts(folder: Path) -> list[GhostDialog]:
    """The dialogues that the stage ``chat`` was trained on."""
    records = json.loads((folder / DIALOGS).read_text("utf-8"))
    return [GhostDialog(*record) for record in records]


def adherence(
    model: Llama,
    tokenizer: Tokenizer,
    town: Town,
    *,
    n_dialogs: int = 66,
    turns: Sequence[int] = TURNS,
    split: str = "train",
    seed: int = 0,
) -> dict[str, Share]:
    """How often answers obey what was said once, by turn: paper, Table 30.

    Requests are held out, answers drawn at temperature 1.

    Args:
        turns: to count at; the last one ends the dialogues.
        split: of the instructions, see `llama2_lite.town.system_instructions`.
    """
    told = system_instructions(split)
    tasks, size = town.tasks("held_out", SHORT), (n_dialogs, turns[-1], LENGTH)
    visits = plan_visits(tokenizer, tasks, told, *size, seed=seed)
    with precision():
        counts = count_obeyed(visits, converse(model, tokenizer, visits, seed=seed))
    return {str(turn): share(*counts[turn - 1]) for turn in turns}
