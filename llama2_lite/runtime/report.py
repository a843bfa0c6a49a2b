"""What a model knows of the town, and the table that says so."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from llama2_lite.generation import generate
from llama2_lite.model import Llama
from llama2_lite.tokenizer import Tokenizer
from llama2_lite.town import Probe, Town

LABELS = {
    "facts_trained_wording": "facts recalled, in a wording trained on",
    "facts_unseen_wording": "facts recalled, in a wording new for them",
    "sums_seen": "sums right, of those trained on",
    "sums_held_out": "sums right, of those held out",
}


def check_knowledge(model: Llama, tokenizer: Tokenizer, town: Town) -> dict[str, float]:
    """The share of facts and sums that a model completes rightly, by split."""
    probes = {
        "facts_trained_wording": town.fact_probes("trained"),
        "facts_unseen_wording": town.fact_probes("unseen_wording"),
        "sums_seen": town.sum_probes("seen"),
        "sums_held_out": town.sum_probes("held_out"),
    }
    return {name: share_right(model, tokenizer, probes[name]) for name in LABELS}


def share_right(
    model: Llama, tokenizer: Tokenizer, probes: Sequence[Probe], batch_size: int = 64
) -> float:
    """The share of probes whose greedy continuation begins with the answer."""
    encoded = [(tokenizer.encode(probe.prompt, bos=True), probe) for probe in probes]
    encoded.sort(key=lambda pair: len(pair[0]))
    n_right = 0
    for start in range(0, len(encoded), batch_size):
        batch = encoded[start : start + batch_size]
        longest = max(len(tokenizer.encode(probe.answer)) for _, probe in batch)
        made = generate(
            model,
            [ids for ids, _ in batch],
            max_new_tokens=longest + 2,
            temperature=0.0,
            stop_ids=[tokenizer.eos_id],
        )
        for (ids, probe), new in zip(batch, made.ids, strict=True):
            text = tokenizer.decode(ids + new)
            n_right += text.startswith(probe.prompt + probe.answer)
    return n_right / len(encoded)


def print_report(report: dict[str, Any], folder: Path) -> None:
    """The report as a table."""
    title = f"the base model, {report['parameters']:,} parameters"
    table = Table(title=title, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("loss, bits per character", f"{report['bits_per_character']:.3f}")
    table.add_row("the town's entropy, at most", f"{report['estimate']:.3f}")
    for name, share in report["right"].items():
        table.add_row(LABELS[name], f"{share:.1%}")
    table.add_row("tokens/s in training", f"{report['tokens_per_second']:,.0f}")
    for name, minutes in report["minutes"].items():
        table.add_row(f"minutes, {name}", f"{minutes:.1f}")
    table.add_row("minutes in all", f"{sum(report['minutes'].values()):.1f}")
    console = Console(file=sys.stdout)
    console.print(table)
    console.print(f"all of it is in {folder}, the figures in {folder / 'report.json'}")
