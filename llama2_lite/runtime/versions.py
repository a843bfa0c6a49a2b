"""What the versions of `llama2-lite tour --rounds 5` are worth, and their table.

Each answers the same held-out prompts, and is judged by the oracle, by the newest
reward models, and by a general one that has trained nobody.
"""

import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from llama2_lite.generation import for_decoding
from llama2_lite.model import Llama
from llama2_lite.reward import RewardModel, answered, score_pairs
from llama2_lite.rlhf import Version, accuracy_by_round, plan_rounds, run_rounds
from llama2_lite.runtime.alignment import AlignmentRecipe, AlignmentStages, read_pairs
from llama2_lite.runtime.artifacts import Artifact, write_json
from llama2_lite.runtime.gains import WINS_AND_TIES, add_figures, write_share
from llama2_lite.runtime.judge import Evaluation, Share, Wins, share
from llama2_lite.runtime.rounds import (
    AXES,
    RewardModels,
    Rounds,
    RoundsRecipe,
)
from llama2_lite.runtime.tour import Recipe, Stages, read_seconds
from llama2_lite.runtime.training import prepare_process

BINS, REACH = 24, 3.0  # of a histogram of scores

Made = Version[Artifact, RewardModels]


def mean_share(values: np.ndarray) -> Share:
    """Mean of values (N,), with a 95% interval by the normal distribution."""
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    mean = float(values.mean())
    return Share(mean, mean - half, mean + half)


def count_wins(ours: np.ndarray, theirs: np.ndarray) -> Wins:
    """Which answers have the higher score; equal ones are ties."""
    wins, losses = int((ours > theirs).sum()), int((ours < theirs).sum())
    rate = share(wins, wins + losses) if wins + losses else Share(0.5, 0.0, 1.0)
    return Wins(wins, len(ours) - wins - losses, losses, rate)


def histogram(scores: np.ndarray, reference: np.ndarray) -> list[int]:
    """How many scores fall into each of ``BINS`` bins.

    Ranking fixes differences between scores only, so the bins are in standard
    deviations of a reference's scores, from their mean; what is outside of
    ``REACH`` counts at the ends.
    """
    steps = (scores - reference.mean()) / (reference.std() or 1.0)
    return np.histogram(steps.clip(-REACH, REACH), BINS, (-REACH, REACH))[0].tolist()


def named_models(start: Artifact, versions: Sequence[Made]) -> dict[str, Artifact]:
    """The fine-tuned model and all versions, with and without PPO, by name."""
    models = {"sft": start}
    for version in versions:
        models[f"v{version.number}"] = version.tuned
        if version.model != version.tuned:
            models[f"v{version.number} with PPO"] = version.model
    return models


class Judges:
    """Three judges of answers to the prompts for evaluation.

    Args:
        rounds: has made the versions.
        newest: the last reward models.
        general: the one that is held apart.
    """

    def __init__(self, rounds: Rounds, newest: RewardModels, general: Artifact):
        self.tokenizer = rounds.tokenizer
        self.evaluation = Evaluation(rounds.town, rounds.stages.seed)
        prompts = self.evaluation.prompts
        self.tasks = [*prompts.safe, *prompts.unsafe]
        self.n_safe = len(prompts.safe)
        self.models = {
            "newest": [RewardModel.from_pretrained(made.path) for made in newest],
            "general": 2 * [RewardModel.from_pretrained(general.path)],
        }

    def scores(self, answers: Sequence[str], judge: str) -> list[np.ndarray]:
        """Helpfulness of answers to harmless prompts, safety of those to unsafe ones.

        Args:
            answers: to all prompts; those to borderline prompts do not count.
            judge: "newest" or "general".
        """
        dialogs = [
            answered(task.dialog(), text or "-")
            for task, text in zip(self.tasks, answers, strict=False)
        ]
        parts = dialogs[: self.n_safe], dialogs[self.n_safe :]
        pairs = zip(self.models[judge], parts, strict=True)
        return [model.score(self.tokenizer, part).numpy() for model, part in pairs]


def judge_versions(rounds: Rounds, versions: Sequence[Made]) -> dict[str, Any]:
    """Figures of all versions, as JSON values."""
    judges = Judges(rounds, versions[-1].reward, rounds.general())
    evaluation, found, scores = judges.evaluation, {}, {}
    for name, made in named_models(rounds.start, versions).items():
        model = for_decoding(Llama.from_pretrained(made.path))
        answers = evaluation.answers(model, rounds.tokenizer)
        found[name] = evaluation.judge(answers)
        scores[name] = {who: judges.scores(answers, who) for who in judges.models}
    figures: dict[str, Any] = {}
    for name, judgement in found.items():
        safe, unsafe, _ = evaluation.split(judgement)
        wins: dict[str, Any] = {}
        for other in ("sft", "v1"):
            against = wins[other] = {
                "oracle": evaluation.compare(judgement, found[other])
            }
            for who, ours in scores[name].items():
                pairs = zip(ours, scores[other][who], strict=True)
                against[who] = dict(
                    zip(
                        ("helpful", "safe"),
                        (count_wins(*p) for p in pairs),
                        strict=True,
                    )
                )
        figures[name] = {
            "shares": evaluation.figures(judgement),
            "helpfulness": mean_share(safe.helpfulness),
            "safety": mean_share(unsafe.safety),
            "wins": wins,
            "histograms": {
                who: dict(
                    zip(AXES, map(histogram, ours, scores["sft"][who]), strict=True)
                )
                for who, ours in scores[name].items()
            },
        }
    return {"versions": figures, "accuracy": accuracies(rounds, versions)}


def accuracies(rounds: Rounds, versions: Sequence[Made]) -> dict[str, Any]:
    """Reward models of all rounds on held-out pairs of all rounds, by axis."""
    tables = {}
    for axis in AXES:
        models = [
            RewardModel.from_pretrained(getattr(version.reward, axis).path)
            for version in versions
        ]
        folders = [rounds.stages.folder / f"pairs{v.number}" for v in versions]
        pairs = [read_pairs([Artifact(f, "")], f"held_out_{axis}") for f in folders]
        scores = [partial(score_pairs, model, rounds.tokenizer) for model in models]
        table = accuracy_by_round(scores, pairs)
        tables[axis] = {
            "shares": torch.round(table, decimals=4).tolist(),
            "pairs": [len(some) for some in pairs],
        }
    return tables


def print_versions(report: dict[str, Any], seconds: float) -> None:
    """The table of `llama2-lite tour --rounds 5`."""
    console = Console(file=sys.stdout)
    table = Table(title="versions, in % by the oracle, with 95% intervals")
    table.add_column("", min_width=len("helpfulness"))
    for name in report["versions"]:
        table.add_column(name, justify="right")
    found = report["versions"].values()
    row = [write_share(version["helpfulness"]) for version in found]
    table.add_row("helpfulness", *row)
    wins = [
        version["wins"]["sft"]["oracle"] if name != "sft" else {}
        for name, version in report["versions"].items()
    ]
    add_figures(table, [version["shares"] for version in found], wins)
    console.print(table)
    table = Table(title="held-out pairs ranked as annotators did, in %: helpfulness")
    table.add_column("reward model")
    rows = report["accuracy"]["helpfulness"]["shares"]
    for number in range(len(rows)):
        table.add_column(f"pairs {number + 1}", justify="right")
    for number, row in enumerate(rows, start=1):
        table.add_row(f"of round {number}", *(f"{100 * share:.0f}" for share in row))
    console.print(table)
    console.print(
        f"{WINS_AND_TIES}; pairs 1 are answers of sft, pairs 2 of v1, and so on\n"
        f"{seconds / 60:.1f} minutes"
    )


def make_rounds(
    alignment: AlignmentStages,
    start: Artifact,
    n_rounds: int,
    recipe: RoundsRecipe,
    kind: type[Rounds] = Rounds,
) -> dict[str, Any]:
    """Make and judge so many versions, in the folder of the stages."""
    rounds = kind(alignment, start, recipe)
    plan = plan_rounds(n_rounds, recipe.all_from, recipe.ppo_from)
    versions = list(run_rounds(start, rounds, plan))
    inputs = [version.model for version in versions] + [rounds.general()]
    modules = ("town", "chat", "generation", "reward", "rlhf")

    @alignment.stage(
        "judgement", {}, inputs, *modules, "runtime.judge", "runtime.versions"
    )
    def made(folder: Path) -> None:
        alignment.stages.say("judgement: what each version is worth")
        write_json(folder / "versions.json", judge_versions(rounds, versions))

    return json.loads((made.path / "versions.json").read_text("utf-8"))


def tour_rounds(
    folder: str | Path,
    n_rounds: int,
    seed: int = 0,
    base_recipe: str | Path | None = None,
    recipe: RoundsRecipe | None = None,
) -> dict[str, Any]:
    """Make versions of the tour's chat model, print what each is worth, and note it.

    The figures go to ``rounds/report.json``.
    """
    prepare_process()
    recipe = recipe or RoundsRecipe.read()
    stages = Stages(folder, Recipe.read(base_recipe), seed)
    alignment = AlignmentStages(stages, AlignmentRecipe.read(), seed)
    start = alignment.sft()
    alignment.folder = stages.folder / "rounds"
    report = make_rounds(alignment, start, n_rounds, recipe)
    made = sorted(alignment.folder.glob("*/seconds.json"))
    seconds = sum(read_seconds(path.parent) for path in made)
    report |= {"rounds": n_rounds, "minutes": seconds / 60, "seed": seed}
    write_json(alignment.folder / "report.json", report)
    print_versions(report, seconds)
    return report
