"""Five rounds of RLHF, and what makes them work: `python benchmarks/rlhf.py`.

Each run starts from the tour's fine-tuned model. An arm differs from the first in its
reward models alone. Chapter 17 shows the versions.
"""

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from llama2_lite.runtime.alignment import AlignmentRecipe, AlignmentStages, aligned
from llama2_lite.runtime.artifacts import Artifact, file_hash, write_result
from llama2_lite.runtime.rounds import RewardModels, Rounds, RoundsRecipe
from llama2_lite.runtime.tour import Recipe, Stages, read_seconds
from llama2_lite.runtime.training import prepare_process
from llama2_lite.runtime.versions import make_rounds
from llama2_lite.tokenizer import Tokenizer

N_ROUNDS = 5
SEEDS = {  # of each arm
    "fresh": [0, 1, 2],
    "scalar": [0, 1],
    "stale": [0, 1],
    "stale scalar": [0, 1],
}
MODULES = [
    *("town", "layers", "attention", "model", "generation", "pretraining"),
    *("chat", "sft", "reward", "rejection", "ppo", "rlhf"),
]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "rlhf.json"
FOLDER = Path(__file__).parents[1] / "runs" / "rlhf"


class Stale(Rounds):
    """The reward models of the first round, for ever.

    Later pairs are held out: they say what these models know of the newest answers.
    """

    def collect(self, number: int, model: Artifact) -> Artifact:
        if number > 1:
            nobody = replace(
                self.recipe.preferences,
                helpful_requests=0,
                safety_requests=0,
                written=0,
                refusals=0,
            )
            self.recipe = replace(self.recipe, preferences=nobody)
        return super().collect(number, model)

    def learn(self, number: int, pairs: Sequence[Artifact]) -> RewardModels:
        return super().learn(1, pairs[:1])


class Scalar(Rounds):
    """The paper's reward for helpfulness: a scalar head that reads no likelihoods."""

    def learn(self, number: int, pairs: Sequence[Artifact]) -> RewardModels:
        recipe, reward = self.recipe, self.recipe.reward
        paper = replace(reward.helpfulness, likelihood_weight=0, next_token_weight=0)
        self.recipe = replace(recipe, reward=replace(reward, helpfulness=paper))
        learned = super().learn(number, pairs)
        self.recipe = recipe  # the judge that is held apart is that of the other arms
        return learned


class StaleScalar(Stale, Scalar):
    """Both: a scalar head of the first round, for ever."""


ARMS: dict[str, type[Rounds]] = {
    "fresh": Rounds,
    "scalar": Scalar,
    "stale": Stale,
    "stale scalar": StaleScalar,
}
FIRST = ("pairs1", "helpfulness1", "safety1", "picks1", "v1", "general")


class Alone(AlignmentStages):
    """Stages in a folder of their own, with the tokenizer of a given model.

    Args:
        folder: where artifacts are kept.
        start: folder of the fine-tuned model.
        seed: of all that is drawn.
    """

    def __init__(self, folder: Path, start: Path, seed: int):
        super().__init__(Stages(folder, Recipe.read()), AlignmentRecipe.read(), seed)
        self.start = start

    def tokenizer(self) -> Tokenizer:
        """That of the fine-tuned model."""
        return Tokenizer(self.start / "tokenizer.model")


def run(arm: str, folder: Path, start: Artifact, seed: int) -> dict[str, Any]:
    """One run of all rounds; what another arm has made of round 1 serves this one."""
    here = folder / arm.replace(" ", "-")
    first = folder / ("scalar" if arm == "stale scalar" else "fresh")
    for name in FIRST:
        if (first / name).is_dir() and not (here / name).exists():
            shutil.copytree(first / name, here / name)
    stages = Alone(here, start.path, seed)
    report = make_rounds(stages, start, N_ROUNDS, RoundsRecipe.read(), ARMS[arm])
    if arm != "fresh":  # only its distributions are shown
        for found in report["versions"].values():
            del found["histograms"]
    seconds = sum(read_seconds(path.parent) for path in here.glob("*/seconds.json"))
    return {**report, "minutes": round(seconds / 60, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="some arms, for a trial")
    parser.add_argument("--seeds", nargs="*", type=int, default=SEEDS["fresh"])
    parser.add_argument("--start", type=Path, help="a fine-tuned model; the tour's")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of all models")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a JSON file")
    arguments = parser.parse_args()
    prepare_process()
    logging.disable(logging.WARNING)
    path = arguments.start or aligned().sft().path
    start = Artifact(path, file_hash(path / "model.safetensors"))
    results: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for arm in arguments.only or ARMS:
            if seed not in SEEDS[arm]:
                continue
            folder = arguments.folder / f"seed{seed}"
            found = run(arm, folder, start, seed)
            results.setdefault(arm, []).append(found)
            write_result(  # after each run: what is there survives an interruption
                arguments.output,
                config={
                    "rounds": N_ROUNDS,
                    "seeds of arms": SEEDS,
                    **asdict(RoundsRecipe.read()),
                },
                seeds=arguments.seeds[: max(map(len, results.values()))],
                modules=MODULES,
                script=__file__,
                results=results,
            )
            print(arm, seed, found["minutes"], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
