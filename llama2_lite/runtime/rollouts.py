"""Sampling from a policy of which no device has room for a copy."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from llama2_lite.model import Llama
from llama2_lite.scaling import share_products


@contextmanager
def unsharded(model: Llama) -> Iterator[Llama]:
    """A model to sample from, whose weights are those of a model that is laid out.

    Shards are gathered in the type of the products, and stay so until the end. What
    a tensor group shares stays shared: its processes sample the same tokens together.

    Args:
        model: from `llama2_lite.scaling.lay_out`, or whole on one device.
    """
    sharded = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in sharded:
        part.unshard()
    try:
        yield share_weights(model)
    finally:
        for part in sharded:
            part.reshard()


def share_weights(model: Llama) -> Llama:
    """Another model with the same weights, in which nothing waits to be gathered."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    with torch.device("meta"):
        other = Llama(model.config)
    first = weights["output.weight"]
    if isinstance(first, DTensor):
        mesh = first.device_mesh
        share_products(other, mesh)
        # the cache has the heads of this process
        n_kv_heads = model.config.n_kv_heads // mesh.size()
        other.config = replace(model.config, n_kv_heads=n_kv_heads)
    for name, weight in weights.items():
        owner = other.get_submodule(name.rpartition(".")[0])
        owner.weight = nn.Parameter(weight.detach(), requires_grad=False)
    other.cos, other.sin = model.cos, model.sin
    return other.eval()
