"""Decoding speed beside transformers: `python benchmarks/decoding.py`.

Both sides continue the same prompts greedily with the same weights; in fp32 their
tokens must be identical. Rounds are timed in turn, one of each side, so that whatever
else the machine does falls on both. Ratios are of medians.
"""

import argparse
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from llama2_lite.generation import for_decoding, generate
from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.runtime.artifacts import machine_name, write_json

PROMPT, NEW = 8, 128
# Bytes per second, from the makers' data sheets.
PEAK_BANDWIDTH = {"A100": 2.0e12, "H100": 3.35e12, "H200": 4.8e12}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Side = Callable[[torch.Tensor], list[list[int]]]


def make_sides(preset: str, dtype: torch.dtype) -> tuple[Llama, dict[str, Side]]:
    """Four ways to continue prompts, (B, T), by NEW greedy tokens."""
    torch.manual_seed(0)
    model = Llama(LlamaConfig.preset(preset)).to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        theirs = LlamaForCausalLM.from_pretrained(Path(folder) / "model", dtype=dtype)
    model, theirs = model.to(DEVICE).eval(), theirs.to(DEVICE).eval()
    copy = for_decoding(model)

    def ours(
        model: Llama, prompts: torch.Tensor, compiled: bool = False
    ) -> list[list[int]]:
        rows = prompts.tolist()
        found = generate(
            model, rows, max_new_tokens=NEW, temperature=0, compiled=compiled
        )
        return found.ids

    def transformers(prompts: torch.Tensor) -> list[list[int]]:
        with torch.inference_mode():
            found = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=NEW,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return found[:, PROMPT:].tolist()

    return model, {
        "transformers": transformers,
        "ours, no copy for decoding": lambda prompts: ours(model, prompts),
        "ours": lambda prompts: ours(copy, prompts),
        "ours, compiled": lambda prompts: ours(copy, prompts, True),
    }


def time_in_turn(
    sides: dict[str, Side], prompts: torch.Tensor, rounds: int
) -> dict[str, float]:
    """Median seconds of each, called one after the other again and again."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side(prompts)  # returns lists, so it is done when it returns
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def bytes_per_token(model: Llama, batch_size: int) -> float:
    """What one step must read: each weight once, and half of the final cache."""
    config, size = model.config, model.output.weight.element_size()
    weights = config.parameter_count() - config.vocab_size * config.dim
    keys_and_values = 2 * config.n_layers * config.n_kv_heads * config.head_dim
    return size * (weights + batch_size * keys_and_values * (PROMPT + NEW / 2))


def peak_bandwidth() -> tuple[float, str]:
    """How fast memory can be read, and where the number is from."""
    if DEVICE == "cuda":
        for name, bandwidth in PEAK_BANDWIDTH.items():
            if name in torch.cuda.get_device_name():
                return bandwidth, "data sheet"
    numbers = torch.ones(2**28 if DEVICE == "cuda" else 2**26, device=DEVICE)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - start)
    return numbers.nbytes / best, f"best of ten sums of {numbers.nbytes >> 20} MiB"


def measure(
    preset: str, dtype: torch.dtype, batch_size: int, rounds: int, compile_too: bool
) -> dict[str, object]:
    """Everything about one size and batch."""
    model, sides = make_sides(preset, dtype)
    if not compile_too:
        del sides["ours, compiled"]
    torch.manual_seed(1)
    vocab_size = model.config.vocab_size
    prompts = torch.randint(3, vocab_size, (batch_size, PROMPT), device=DEVICE)
    tokens = {}
    for name, side in sides.items():
        for _ in range(2):  # the first one compiles
            tokens[name] = side(prompts)
    identical = all(found == tokens["ours"] for found in tokens.values())
    if dtype == torch.float32 and not identical:
        raise SystemExit(f"{preset}, batch {batch_size}: the tokens differ")
    median = time_in_turn(sides, prompts, rounds)
    peak, source = peak_bandwidth()
    read = NEW * bytes_per_token(model, batch_size)
    rate = {name: batch_size * NEW / seconds for name, seconds in median.items()}
    return {
        "model": preset,
        "type": str(dtype).removeprefix("torch."),
        "batch": batch_size,
        "rounds": rounds,
        "tokens_per_second": {name: round(value) for name, value in rate.items()},
        "ratios": {
            name: round(median["transformers"] / seconds, 2)
            for name, seconds in median.items()
            if name != "transformers"
        },
        "identical_tokens": identical,
        "share_of_bandwidth": {
            name: round(read / seconds / peak, 3) for name, seconds in median.items()
        },
        "bandwidth": f"{peak / 1e9:.1f} GB/s, {source}",
    }


def main() -> None:
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    cases = [("8m", torch.float32, 1), ("8m", torch.float32, 32)]
    if DEVICE == "cuda":
        cases += [("1b", torch.bfloat16, 1), ("1b", torch.bfloat16, 32)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7, help="of each side")
    parser.add_argument("--no-compile", action="store_true", help="skip compilation")
    slug = re.sub(r"\W+", "-", machine_name().lower())
    output = Path(__file__).parent / "results" / f"decoding-{slug}.json"
    parser.add_argument("--output", type=Path, default=output, help="a JSON file")
    arguments = parser.parse_args()
    record = {
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "prompt": PROMPT,
        "new_tokens": NEW,
    }
    results = []
    for preset, dtype, batch_size in cases:
        compile_too = not arguments.no_compile
        results.append(
            measure(preset, dtype, batch_size, arguments.rounds, compile_too)
        )
        print(json.dumps(results[-1], indent=1), flush=True)
    write_json(arguments.output, {**record, "results": results})


if __name__ == "__main__":
    main()
