"""Sampling from a divided policy gives what sampling from a copy of it gives."""

import os
import socket
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_ppo import write_model
from torch.distributed.tensor import DTensor

from llama2_lite.generation import generate
from llama2_lite.model import Llama, read_config
from llama2_lite.ppo import rollout_copy
from llama2_lite.runtime.rollouts import unsharded
from llama2_lite.scaling import Layout, lay_out, make_mesh

N_PROCESSES = 4
PROMPTS = [[1, 5 + i, 9] * (1 + i % 3) for i in range(6)]


def compare(chat: Path, layout: Layout, dtype: torch.dtype) -> tuple[int, int]:
    """Sample both ways; returns weights held here meanwhile, and those of the model."""
    config = read_config(chat / "config.json")
    mesh = make_mesh("cpu", layout.sizes(N_PROCESSES, config))
    model = lay_out(
        lambda: Llama(config), lambda m: m.load_weights(chat), mesh, layout, dtype
    )
    settings = {"max_new_tokens": 20, "stop_ids": [2], "seed": 3}
    copied = generate(rollout_copy(model), PROMPTS, **settings)
    with unsharded(model) as policy:
        own = generate(policy, PROMPTS, **settings)
        parts = [
            weight.to_local() if isinstance(weight, DTensor) else weight
            for weight in policy.parameters()
        ]
        assert {part.dtype for part in parts} == {dtype}
        held = sum(part.numel() for part in parts)
    if dtype == torch.float32:
        assert own.ids == copied.ids
        for row, expected in zip(own.logprobs, copied.logprobs, strict=True):
            torch.testing.assert_close(row, expected, atol=2e-6, rtol=0)
    # divided again, and none the worse for it
    assert all(p.to_local().numel() < p.numel() for p in model.parameters())
    model(torch.tensor([[1, 2, 3]])).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    return held, config.parameter_count()


def work(rank: int, port: int, chat: Path) -> None:
    """One of the processes."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=N_PROCESSES)
    held, total = compare(chat, Layout(), torch.float32)
    assert held == total
    held, total = compare(chat, Layout(tensor=2), torch.float32)
    assert held < 0.55 * total  # all but the norms is divided by two
    compare(chat, Layout(tensor=2), torch.bfloat16)
    dist.destroy_process_group()


def test_a_divided_policy_answers_as_its_copy(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    chat = write_model(tmp_path)
    torch.multiprocessing.spawn(work, (port, chat), nprocs=N_PROCESSES)


def test_one_device_shares_its_weights(tmp_path):
    model = Llama.from_pretrained(write_model(tmp_path))
    with unsharded(model) as policy:
        pairs = zip(policy.parameters(), model.parameters(), strict=True)
        assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)
        own = generate(policy, PROMPTS, max_new_tokens=20, seed=3)
    assert own == generate(model, PROMPTS, max_new_tokens=20, seed=3)
