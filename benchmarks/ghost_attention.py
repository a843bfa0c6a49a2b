"""Does an instruction hold for twenty turns? `python benchmarks/ghost_attention.py`.

The tour's model before Ghost Attention is trained as the tour does it, and in other
ways that chapter 16 compares with it. Each is then asked, told once, to obey in
dialogues of held-out requests: instructions that it was trained on, two of them at a
time, and others. Seeds differ in everything from there on: in the dialogues to learn,
their replies, the training and the dialogues of the test.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

from lightning import Trainer

from llama2_lite.generation import for_decoding
from llama2_lite.ghost_attention import (
    GhostAttentionModule,
    GhostDataset,
    Tree,
    Visit,
    converse,
    count_obeyed,
    deal_instructions,
    grow_tree,
    plan_visits,
)
from llama2_lite.model import Llama
from llama2_lite.pretraining import best_precision
from llama2_lite.runtime.alignment import AlignmentStages, aligned
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.batches import Served
from llama2_lite.runtime.ghost import (
    GhostRecipe,
    drop_unsafe,
    ghost_data,
    read_ghosts,
    sample_ghosts,
)
from llama2_lite.runtime.judge import Evaluation
from llama2_lite.runtime.training import TRAINER_DEFAULTS, precision, prepare_process
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import SystemInstruction, build_town, system_instructions

CONFIG: dict[str, Any] = {
    "tests": {"trained on": 44, "not trained on": 56, "two at a time": 44},
    "turns": {"trained on": 20, "not trained on": 20, "two at a time": 10},  # that fit
    "length": 900,
    "kinds": ["fact", "sum", "opposite"],
}
SEEDS = [0, 1, 2]
SHAPES = ("never", "all learned")
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "ghost_attention.json"
TOWN = build_town()


class Shaped(GhostDataset):
    """Trees of one shape only.

    Args:
        shape: with "never" and "all learned", the dialogue never goes on from a reply
            that obeys; with the latter, its own answers are learned too, which had
            been told nothing.
    """

    def __init__(self, shape: str, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.shape = shape

    def _tree(self, position: int) -> Tree:
        turns, *_ = self._turns(position)
        tree = grow_tree(turns, [False] * len(turns))
        end = 0
        for turn in turns if self.shape == "all learned" else []:
            start = end + len(turn.request)
            end = start + len(turn.answer)
            tree.learn[start:end] = [True] * len(turn.answer)
        return tree


def train(folder: Path, data: Served, recipe: GhostRecipe) -> Llama:
    """Fine-tune the model of a folder."""
    module = GhostAttentionModule(folder, recipe.lr, recipe.warmup)
    trainer = Trainer(
        max_steps=recipe.steps,
        precision=best_precision(),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        **TRAINER_DEFAULTS,
    )
    trainer.fit(module, datamodule=data)
    return module.model.eval()


def all_visits(tokenizer: Tokenizer, seed: int) -> dict[str, list[Visit]]:
    """Held-out requests for dialogues of the turns that are tested."""
    tasks = TOWN.tasks("held_out", CONFIG["kinds"])
    known, tests = system_instructions("train"), CONFIG["tests"]
    pairs = deal_instructions(known, 1.0, Random(f"pairs {seed}"))
    told_of: dict[str, list[SystemInstruction]] = {
        "trained on": known,
        "not trained on": system_instructions("held_out"),
        "two at a time": list(islice(pairs, tests["two at a time"])),
    }
    turns, length = CONFIG["turns"], CONFIG["length"]
    return {
        test: plan_visits(
            tokenizer, tasks, told_of[test], n, turns[test], length, seed=seed
        )
        for test, n in tests.items()
    }


def obeyed(
    model: Llama, tokenizer: Tokenizer, visits: list[Visit], seed: int
) -> list[list[int]]:
    """For each turn: how many answers obeyed, of how many."""
    with precision():
        answers = converse(for_decoding(model), tokenizer, visits, seed=seed)
    return [list(counts) for counts in count_obeyed(visits, answers)]


def alone(model: Llama, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """What answers to single requests, without instruction, are worth."""
    evaluation = Evaluation(TOWN, seed)
    with precision():
        answers = evaluation.answers(for_decoding(model), tokenizer)
    return dict(evaluation.figures(evaluation.judge(answers)))


def study(stages: AlignmentStages, seed: int) -> dict[str, Any]:
    """One seed: everything that chapter 16 shows. The tour's own is not made again."""
    tokenizer, folder, recipe = (
        stages.tokenizer(),
        stages.ppo().path,
        stages.recipe.chat,
    )
    visits = all_visits(tokenizer, seed)
    before = Llama.from_pretrained(folder)
    is_tour = seed == stages.seed
    if is_tour:
        ghosts = read_ghosts(stages.chat().path)
    else:
        sampled = sample_ghosts(for_decoding(before), tokenizer, TOWN, recipe, seed)
        ghosts = drop_unsafe(sampled, stages.score_both())

    def data(kind: Callable[..., GhostDataset] = GhostDataset) -> Served:
        return ghost_data(ghosts, tokenizer, recipe, seed, kind)

    if is_tour:
        after = Llama.from_pretrained(stages.chat().path)
    else:
        after = train(folder, data(), recipe)
    replies = [reply is not None for one in ghosts for reply in one.replies]
    figures: dict[str, Any] = {"replies kept": sum(replies) / len(replies)}
    for name, model in (("without", before), ("with", after)):
        figures[name] = {
            "alone": alone(model, tokenizer, seed),
            "obeyed": {
                test: obeyed(model, tokenizer, planned, seed)
                for test, planned in visits.items()
            },
        }
    for shape in SHAPES:

        def shaped(*args: Any, shape: str = shape, **options: Any) -> GhostDataset:
            return Shaped(shape, *args, **options)

        model = train(folder, data(shaped), recipe)
        found = obeyed(model, tokenizer, visits["trained on"], seed)
        figures[shape] = {"obeyed": {"trained on": found}}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a JSON file")
    arguments = parser.parse_args()
    prepare_process()
    stages = aligned()
    results: dict[str, Any] = {}
    for seed in arguments.seeds:
        results[str(seed)] = study(stages, seed)
        print(seed, results[str(seed)], file=sys.stderr, flush=True)
        write_result(
            arguments.output,
            config=CONFIG | {"recipe": asdict(stages.recipe.chat)},
            seeds=list(map(int, results)),
            modules=["town", "model", "generation", "chat", "sft", "ghost_attention"],
            script=__file__,
            results=results,
        )


if __name__ == "__main__":
    main()
