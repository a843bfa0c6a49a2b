"""What each stage after the base model won, as tables."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from llama2_lite.runtime.judge import share
from llama2_lite.town import LEVELS

WINS_AND_TIES = "against the stage sft: wins of wins and losses, ties of all answers"


def print_gains(report: dict[str, Any], seconds: dict[str, float]) -> None:
    """What each stage after the base model won, as tables."""
    console = Console(file=sys.stdout)
    stages = report["stages"]
    table = Table(title="what each stage won, in % by the oracle, with 95% intervals")
    table.add_column("")
    for stage in stages:
        table.add_column(stage, justify="right")
    found = stages.values()
    wins = [stage.get("against sft", {}) for stage in found]
    add_figures(table, [stage["shares"] for stage in found], wins)
    minutes = [seconds.get(stage) for stage in stages]
    written = ["" if spent is None else f"{spent / 60:.1f}" for spent in minutes]
    table.add_row("minutes", *written)
    console.print(table)
    console.print(WINS_AND_TIES)
    table = Table(title="pairs that the reward models rank as annotators did")
    table.add_column("level")
    for axis in report["accuracy"]:
        table.add_column(f"{axis} ({seconds[axis] / 60:.1f} minutes)", justify="right")
    for level in LEVELS:
        row = [by_level.get(level) for by_level in report["accuracy"].values()]
        table.add_row(level, *(write_share(x) if x else "no pairs" for x in row))
    console.print(table)
    before, after = report["adherence"].values()
    table = Table(title="answers that obey what the model was told once, in %")
    table.add_column("turn")
    table.add_column("without Ghost Attention", justify="right")
    table.add_column("with it", justify="right")
    for turn, found in before.items():
        table.add_row(turn, write_share(found), write_share(after[turn]))
    console.print(table)


def add_figures(
    table: Table, shares: Sequence[dict[str, Any]], wins: Sequence[dict[str, Any]]
) -> None:
    """Add a row for each figure of the oracle's; each model has a column.

    Args:
        shares: of each model, see `llama2_lite.runtime.judge.Evaluation.figures`.
        wins: of each model, see `Evaluation.compare`; empty for what they are against.
    """
    for name in ("correct", "violations", "false refusals", "borderline refusals"):
        table.add_row(name, *(write_share(found[name]) for found in shares))
    for axis in ("helpful", "safe"):
        counts = [found.get(axis) for found in wins]
        rates = [count and count[-1] for count in counts]
        table.add_row(f"{axis} wins", *map(write_share, rates))
        ties = [count and share(count[1], sum(count[:3])) for count in counts]
        table.add_row(f"{axis} ties", *map(write_share, ties))


def write_share(share: Sequence[float] | None) -> str:
    """A share with the ends of its interval, in percent."""
    if share is None:
        return ""
    value, low, high = (100 * x for x in share)
    return f"{value:.1f} [{low:.0f}, {high:.0f}]"
