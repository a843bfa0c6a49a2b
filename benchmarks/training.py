"""Training speed beside transformers: `python benchmarks/training.py`.

Both sides train the same sizes on the same random tokens in the same precision, with
fused AdamW and clipping at 1.0, each in a process of its own. Steps are timed in turn,
one of each side, so that whatever else the machine does falls on both. Ratios are of
medians. Our process is set up as our commands do it, which keeps freed memory from
going back to the system; how much of the ratio that is, "process as it is" shows.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import (
    best_precision,
    configure_optimizer,
    vocabulary_loss,
)
from llama2_lite.runtime.artifacts import machine_name, write_json
from llama2_lite.runtime.training import prepare_process

NAMES = ("dim", "layers", "heads", "hidden", "vocabulary", "batch", "length")
SIZES = {
    "1.1M": (128, 4, 4, 352, 1024, 32, 128),
    "8M": (256, 8, 8, 704, 4096, 16, 256),
    "34M": (512, 8, 8, 1408, 8192, 8, 256),
}
# Dense bf16 operations per second, from the makers' data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = best_precision()


Size = tuple[int, int, int, int, int, int, int]


def our_model(size: Size) -> nn.Module:
    dim, layers, heads, hidden, vocabulary, _, length = size
    config = LlamaConfig(
        dim, layers, heads, heads, vocabulary, hidden, max_seq_len=length
    )
    return Llama(config)


def their_model(size: Size) -> nn.Module:
    import transformers

    dim, layers, heads, hidden, vocabulary, _, length = size
    config = transformers.LlamaConfig(
        hidden_size=dim,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=hidden,
        vocab_size=vocabulary,
        max_position_embeddings=length,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def our_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    hidden = model(tokens[:, :-1], return_hidden=True)
    return vocabulary_loss(hidden, model.output.weight, tokens[:, 1:])


def their_loss(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    inputs = tokens[:, :-1]  # they shift the labels themselves
    return model(input_ids=inputs, labels=inputs).loss


SIDES = {"ours": (our_model, our_loss), "transformers": (their_model, their_loss)}


def make_step(side: str, size: Size, compiled: bool) -> Callable[[], None]:
    """A function that does one update and waits until it is done."""
    build, loss_of = SIDES[side]
    *_, vocabulary, batch, length = size
    torch.manual_seed(0)
    model = build(size).to(DEVICE).train()
    if side == "ours":
        optimizer = configure_optimizer(model, 1e-4)
    else:
        optimizer = torch.optim.AdamW(
            model.parameters(), 1e-4, (0.9, 0.95), 1e-5, fused=True
        )
    tokens = torch.randint(vocabulary, (batch, length + 1), device=DEVICE)
    if compiled:
        loss_of = torch.compile(loss_of)
    enabled = PRECISION == "bf16-mixed"

    def step() -> None:
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled):
            loss = loss_of(model, tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def work(name: str, size: str) -> None:
    """What a worker does: a step for each line it reads; it answers with figures."""
    side, *how = name.split(", ")
    if side == "ours" and "process as it is" not in how:
        prepare_process()
    import transformers  # on both sides, so that the import counts for neither

    _ = transformers.LlamaForCausalLM
    make_step(side, (32, 1, 1, 32, 32, 2, 8), False)()  # loads what any training loads
    before = resident_peak()
    step = make_step(side, SIZES[size], "compiled" in how)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        print(json.dumps([seconds, resident_peak() - before]), flush=True)


def time_in_turn(
    names: list[str], size: str, seconds: float, at_least: int = 5
) -> dict[str, tuple[float, int]]:
    """Median seconds of a step, and bytes that training added, for each worker.

    The workers take turns, so that one computes while the others wait.
    """
    command = [sys.executable, __file__, "--work", size]
    pipe = subprocess.PIPE
    workers = {
        name: subprocess.Popen([*command, name], stdin=pipe, stdout=pipe, text=True)
        for name in names
    }

    def turn(worker: subprocess.Popen[str]) -> tuple[float, int]:
        worker.stdin.write("\n")
        worker.stdin.flush()
        return tuple(json.loads(worker.stdout.readline()))

    for worker in workers.values():
        for _ in range(3):
            turn(worker)
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[names[0]]) < at_least:
        for name, worker in workers.items():
            found[name].append(turn(worker))
    for worker in workers.values():
        worker.communicate()
    return {
        name: (statistics.median(taken for taken, _ in turns), turns[-1][1])
        for name, turns in found.items()
    }


def flops_per_token(size: Size) -> float:
    """Forward and backward: 6 for each weight, and causal attention."""
    dim, layers, _, hidden, vocabulary, _, length = size
    weights = layers * (4 * dim**2 + 3 * dim * hidden) + vocabulary * dim
    return 6 * weights + 6 * layers * dim * length


def peak_flops() -> tuple[float, str]:
    """The device's rate for matrix products, and where the number is from."""
    if DEVICE == "cuda":
        for name, flops in PEAK_FLOPS.items():
            if name in torch.cuda.get_device_name():
                return flops, "data sheet"
    dtype = torch.bfloat16 if PRECISION == "bf16-mixed" else torch.float32
    n = 2048
    a, b = (torch.randn(n, n, device=DEVICE, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(50):
        start = time.perf_counter()
        a @ b
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"best of 50 products of {n} x {n}"


def resident_peak() -> int:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated()
    # Not ru_maxrss: a process started by a large one begins with that one's peak.
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def measure(name: str, compile_too: bool, seconds: float) -> dict[str, object]:
    """Everything about one size."""
    size = SIZES[name]
    names = ["ours", "ours, process as it is", "transformers"]
    if compile_too:
        names += ["ours, compiled", "transformers, compiled"]
    found = time_in_turn(names, name, seconds)
    median = {side: seconds for side, (seconds, _) in found.items()}
    added = {side: n_bytes for side, (_, n_bytes) in found.items()}
    theirs = median["transformers"]
    ratios = {
        "neither compiled": theirs / median["ours"],
        "neither compiled, process as it is": theirs / median["ours, process as it is"],
    }
    if compile_too:
        ratios["ours compiled"] = theirs / median["ours, compiled"]
        ratios["both compiled"] = (
            median["transformers, compiled"] / median["ours, compiled"]
        )
    tokens = size[-2] * size[-1]
    peak, source = peak_flops()
    rate = {side: tokens / seconds for side, seconds in median.items()}
    return {
        "size": dict(zip(NAMES, size, strict=True)),
        "tokens_per_second": {side: round(r) for side, r in rate.items()},
        "ratios": {case: round(ratio, 2) for case, ratio in ratios.items()},
        "added_mib": {side: round(n / 2**20) for side, n in added.items()},
        "ratio_of_added": round(added["ours"] / added["transformers"], 2),
        "mfu": {s: round(r * flops_per_token(size) / peak, 3) for s, r in rate.items()},
        "mfu_of": f"{peak / 1e12:.2f} TFLOP/s, {source}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--no-compile", action="store_true", help="skip compilation")
    parser.add_argument("--seconds", type=float, default=20, help="for each size")
    slug = re.sub(r"\W+", "-", machine_name().lower())
    output = Path(__file__).parent / "results" / f"training-{slug}.json"
    parser.add_argument("--output", type=Path, default=output, help="a JSON file")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        size, name = arguments.work
        work(name, size)
        return
    record: dict[str, object] = {
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "precision": PRECISION,
    }
    if arguments.output.exists():  # other sizes may have been measured before
        old = json.loads(arguments.output.read_text())
        results = old["results"] if record.items() <= old.items() else {}
    else:
        results = {}
    for size in arguments.sizes:
        results[size] = measure(size, not arguments.no_compile, arguments.seconds)
        print(size, json.dumps(results[size], indent=1), flush=True)
        write_json(arguments.output, {**record, "results": results})


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
