"""The whole tour with several seeds: `python benchmarks/tour_seeds.py`.

Documents, weights, samples, annotators and evaluation prompts change with the seed; the
town stays. Seed 0 is the tour of the repository, which is not made again. The others
lie beside it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import t as student

from llama2_lite.runtime.alignment import STAGES, finish_tour
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.runtime.tour import default_folder, tour

SEEDS = [0, 1, 2]
OUTPUT = Path(__file__).parents[1] / "book" / "results" / "tour.json"


def interval(values: Sequence[float]) -> dict[str, Any]:
    """What seeds agree on: mean, 95% interval of the mean (Student), and each value."""
    n = len(values)
    mean = sum(values) / n
    deviation = (sum((value - mean) ** 2 for value in values) / (n - 1)) ** 0.5
    reach = float(student.ppf(0.975, n - 1)) * deviation / n**0.5
    return {"mean": mean, "low": mean - reach, "high": mean + reach, "seeds": values}


def over_seeds(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of all tours, by stage and name."""
    first, found = reports[0], {}
    for stage, figures in first["stages"].items():
        found[stage] = {
            name: interval([one["stages"][stage]["shares"][name][0] for one in reports])
            for name in figures["shares"]
        }
        for axis in figures.get("against sft", ()):
            wins = [one["stages"][stage]["against sft"][axis] for one in reports]
            found[stage][f"{axis} wins"] = interval([rate[0] for *_, rate in wins])
            found[stage][f"{axis} ties"] = interval(
                [ties / (won + ties + lost) for won, ties, lost, _ in wins]
            )
    for kind in ("accuracy", "adherence"):
        found[kind] = {
            name: {
                key: interval([one[kind][name][key][0] for one in reports])
                for key in shares
            }
            for name, shares in first[kind].items()
        }
    return found


def main() -> None:
    reports = []
    for seed in SEEDS:
        folder = default_folder()
        if seed:
            folder = folder.with_name(f"tour-seed-{seed}")
        tour(folder, seed)
        reports.append(finish_tour(folder, seed))
        print(seed, "done", file=sys.stderr, flush=True)
    modules = ["town", "tokenizer", "corpus", "layers", "attention", "model"]
    modules += ["generation", "pretraining", "chat", "sft", "reward", "rejection"]
    modules += ["ppo", "ghost_attention", "runtime.judge", "runtime.ghost"]
    write_result(
        OUTPUT,
        config={"stages": ["base", *STAGES]},
        seeds=SEEDS,
        modules=modules,
        script=__file__,
        results={
            "over seeds": over_seeds(reports),
            "tours": {str(seed): one for seed, one in zip(SEEDS, reports, strict=True)},
        },
    )


if __name__ == "__main__":
    main()
