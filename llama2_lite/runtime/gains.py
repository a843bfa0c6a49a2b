"""What each stage after the base model won, as tables."""

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_gains(report: dict[str, Any], seconds: dict[str, float]) -> None:
    """What each stage after the base model won, as tables."""
    console = Console(file=sys.stdout)
    table = Table(title="what each stage won, by the oracle (95% intervals)")
    columns = ("correct", "violations", "false refusals", "borderline refusals")
    for name in ("stage", *columns, "helpful wins", "safe wins", "minutes"):
        table.add_column(name, justify="left" if name == "stage" else "right")
    for stage, found in report["stages"].items():
        wins = found.get("against sft", {})
        rates = [wins[axis][-1] if wins else None for axis in ("helpful", "safe")]
        shares = [found["shares"][name] for name in columns]
        minutes = f"{seconds[stage] / 60:.1f}" if stage in seconds else ""
        table.add_row(stage, *map(write_share, [*shares, *rates]), minutes)
    console.print(table)
    table = Table(title="pairs that the reward models rank as annotators did")
    table.add_column("level")
    for axis in report["accuracy"]:
        table.add_column(f"{axis} ({seconds[axis] / 60:.1f} minutes)", justify="right")
    for level in next(iter(report["accuracy"].values())):
        row = [by_level[level] for by_level in report["accuracy"].values()]
        table.add_row(level, *map(write_share, row))
    console.print(table)
    console.print("wins: of wins and losses against the stage sft, ties aside")


def write_share(share: Sequence[float] | None) -> str:
    """A share with the ends of its interval, in percent."""
    if share is None:
        return ""
    value, low, high = (100 * x for x in share)
    return f"{value:.1f} [{low:.0f}, {high:.0f}]"
