"""Memory of each process, predicted and measured: `python benchmarks/memory.py`.

A Llama is laid out over 1, 2 and 4 processes on this machine and accumulates gradients.
Weights, gradients and optimizer state are counted tensor by tensor; all of it together
is what the system says the process needs at most, beyond what it needed after a
training of a very small model, so that code and buffers count for neither side.
"""

import argparse
import gc
import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import configure_optimizer, vocabulary_loss
from llama2_lite.runtime.artifacts import write_result
from llama2_lite.scaling import Layout, lay_out, make_mesh, training_memory

OUTPUT = Path(__file__).parents[1] / "book" / "results" / "memory.json"
MODEL = {
    "dim": 512,
    "n_layers": 12,
    "n_heads": 8,
    "n_kv_heads": 8,
    "vocab_size": 4096,
    "hidden_dim": 1408,
    "max_seq_len": 1024,
}
WARM_UP = MODEL | {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4}
CASES = [  # processes, tensor parallel, blocks computed again, precision
    *((n, 1, again, "bf16-mixed") for again in (False, True) for n in (1, 2, 4)),
    (2, 2, False, "bf16-mixed"),
    (4, 2, True, "bf16-mixed"),
    (2, 1, False, "32-true"),
]


def status(name: str) -> int:
    """A line of this process's account, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{name}:\s*(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


class Training:
    """A model laid out over all processes, its optimizer, and steps."""

    def __init__(self, config: LlamaConfig, layout: Layout, dtype: torch.dtype):
        mesh = make_mesh("cpu", layout.sizes(dist.get_world_size(), config))
        build, fill = partial(Llama, config), partial(Llama.init_weights, seed=0)
        self.model = lay_out(build, fill, mesh, layout, dtype)
        self.optimizer = configure_optimizer(self.model, 1e-5)
        self.is_bf16 = dtype == torch.bfloat16

    def accumulate(self, windows: Tensor) -> None:
        """Add the gradients of some windows."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.is_bf16):
            hidden = self.model(windows[:, :-1], return_hidden=True)
            loss = vocabulary_loss(hidden, self.model.output.weight, windows[:, 1:])
        loss.backward()

    def counted(self) -> dict[str, int]:
        """Bytes of the tensors that stay."""
        parameters = list(self.model.parameters())
        states = (s.values() for s in self.optimizer.state.values())
        return {
            "weights": n_bytes(parameters),
            "gradients": n_bytes([p.grad for p in parameters if p.grad is not None]),
            "optimizer": n_bytes([t for s in states for t in s if t.dim() > 0]),
        }


def n_bytes(tensors: list[Any]) -> int:
    """Of what this process has of them."""
    return sum(
        t.to_local().nbytes if isinstance(t, DTensor) else t.nbytes for t in tensors
    )


def work(model: dict[str, int], case: list[Any], windows: int, length: int) -> None:
    """What one process does; it prints its figures."""
    n_processes, tensor, again, precision = case
    dist.init_process_group("gloo")
    dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32
    layout = Layout(tensor=tensor, checkpoint_activations=again)
    torch.manual_seed(dist.get_rank() // tensor)
    tokens = torch.randint(MODEL["vocab_size"], (windows, length + 1))
    small = Training(LlamaConfig(**WARM_UP), layout, dtype)  # type: ignore[arg-type]
    small.accumulate(tokens[:1])
    small.optimizer.step()
    del small
    gc.collect()
    before = status("VmRSS")
    config = LlamaConfig(**model)  # type: ignore[arg-type]
    training = Training(config, layout, dtype)
    training.accumulate(tokens)
    training.optimizer.step()  # the state is there from now on
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    training.accumulate(tokens)
    peak = status("VmHWM") - before
    memory = training_memory(config, layout, n_processes, windows, length, precision)
    figures = {
        "processes": n_processes,
        "tensor": tensor,
        "again": again,
        "precision": precision,
        "predicted": {**vars(memory), "total": memory.total},
        "measured": {**training.counted(), "total": peak},
    }
    if dist.get_rank() == 0:
        print(json.dumps(figures), flush=True)
    dist.destroy_process_group()


def launch(arguments: argparse.Namespace, case: tuple[Any, ...]) -> dict[str, Any]:
    """The figures of the first process of a case; it is the fullest."""
    script = str(Path(__file__).resolve())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={case[0]}", script, "--work", json.dumps(case)]
    command += [f"--layers={arguments.layers}", f"--windows={arguments.windows}"]
    command += [f"--length={arguments.length}"]
    # large blocks go back to the system at once, so that it knows what is in use
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all cases and write them down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="a JSON file")
    parser.add_argument("--layers", type=int, default=MODEL["n_layers"])
    parser.add_argument("--windows", type=int, default=2, help="of each process")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a window")
    parser.add_argument("--cases", type=int, nargs="+", help="numbers of them; all")
    parser.add_argument("--work", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    model = MODEL | {"n_layers": arguments.layers}
    if arguments.work:
        work(model, arguments.work, arguments.windows, arguments.length)
        return
    chosen = arguments.cases or range(len(CASES))
    found = []
    for number in chosen:
        found.append(launch(arguments, CASES[number]))
        print(json.dumps(found[-1]), flush=True)
    write_result(
        arguments.output,
        config={
            "model": model,
            "windows": arguments.windows,
            "length": arguments.length,
        },
        seeds=[0],
        modules=["attention", "layers", "model", "pretraining", "scaling"],
        script=__file__,
        results=found,
    )


if __name__ == "__main__":
    main()
