"""Scaling.

Exported from book/10_scaling.md, which explains every part. Edit it there,
then `make export`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

from llama2_lite.model import Llama, LlamaConfig
from llama2_lite.pretraining import M


def block_activations(
    config: LlamaConfig,
    windows: int,
    sequence: int,
    tensor: int = 1,
    number: int = 2,
    written_out: bool = False,
) -> int:
    """Bytes that one block keeps for the backward pass.

    Args:
        config: of the model.
        windows, sequence: how many, and tokens of each.
        tensor: processes that share each product.
        number: bytes of a number in products and between blocks.
        written_out: whether attention keeps its probabilities, as
            `llama2_lite.attention.attend_written_out` does.
    """
    heads, width = config.n_heads, config.dim
    queries, keys = (h * config.head_dim for h in (heads, config.n_kv_heads))
    # of a norm: its input in fp32, the length of it, the result, and that with gains
    norms = 2 * (4 * width + 4 + 2 * number * width)
    if written_out:
        attention = number * (4 * queries + heads * sequence)
    else:
        attention = number * (2 * queries + 2 * keys) + 4 * heads
    feed_forward = 4 * number * config.hidden_dim
    tokens = windows * sequence
    rotary = 2 * 4 * config.head_dim * sequence
    return tokens * (norms + (attention + feed_forward) // tensor) + rotary


@dataclass(frozen=True)
class Layout:
    """How a model is laid out over processes, one for each device.

    Attributes:
        shard: processes that share one copy of weights, gradients and optimizer state,
            each with a part of every parameter; 0 for as many as there are, 1 for
            copies only.
        tensor: processes that share each matrix product.
        checkpoint_activations: whether the backward pass computes each block again
            instead of having kept what it needs.
        compile: whether blocks are compiled.
    """

    shard: int = 0
    tensor: int = 1
    checkpoint_activations: bool = False
    compile: bool = False

    def sizes(self, n_processes: int, config: LlamaConfig) -> tuple[int, int, int]:
        """Copies, processes that share a copy, and processes that share a product.

        Raises:
            ValueError: if the processes or the heads cannot be divided so.
        """
        if self.tensor < 1 or self.shard < 0:
            raise ValueError(
                f"layout.tensor = {self.tensor} and layout.shard = {self.shard}: "
                "the first must be at least 1, the second at least 0"
            )
        if n_processes % self.tensor:
            raise ValueError(
                f"{n_processes} processes cannot be divided into groups of "
                f"layout.tensor = {self.tensor}"
            )
        for name in ("n_heads", "n_kv_heads"):
            heads = getattr(config, name)
            if heads % self.tensor:
                raise ValueError(
                    f"layout.tensor = {self.tensor} does not divide {name} = {heads}: "
                    "each process of a group needs whole heads"
                )
        groups = n_processes // self.tensor
        shard = self.shard or groups
        if groups % shard:
            raise ValueError(
                f"{n_processes} processes / layout.tensor {self.tensor} = {groups} "
                f"groups, which layout.shard = {shard} does not divide"
            )
        return groups // shard, shard, self.tensor


def parameter_shapes(config: LlamaConfig) -> list[tuple[int, int, int, str]]:
    """Kinds of parameters: how many, rows, columns, and what tensor parallelism splits.

    It splits rows, the outputs of a matrix, or columns, its inputs.
    """
    width, hidden, n = config.dim, config.hidden_dim, config.n_layers
    queries, keys = (h * config.head_dim for h in (config.n_heads, config.n_kv_heads))
    return [
        (1 if config.tie_embeddings else 2, config.vocab_size, width, "rows"),
        (2 * n + 1, width, 1, "nothing"),  # norms
        (n, queries, width, "rows"),  # wq
        (2 * n, keys, width, "rows"),  # wk, wv
        (n, width, queries, "columns"),  # wo
        (2 * n, hidden, width, "rows"),  # w1, w3
        (n, width, hidden, "columns"),  # w2
    ]


def held_parameters(config: LlamaConfig, shard: int = 1, tensor: int = 1) -> int:
    """Parameters that the fullest process holds; shards are whole rows.

    Args:
        config: of the model.
        shard, tensor: as `Layout.sizes` gives them.
    """
    total = 0
    for count, rows, columns, split in parameter_shapes(config):
        rows = -(-rows // tensor) if split == "rows" else rows
        columns = -(-columns // tensor) if split == "columns" else columns
        total += count * -(-rows // shard) * columns
    return total


@dataclass(frozen=True)
class Memory:
    """Bytes on one device while it trains, by what they are for.

    Attributes:
        weights, gradients, optimizer: parts of the model in fp32, there all the time.
        gathered: whole weights of the blocks at work and of what is outside the blocks,
            in the type of the products.
        activations: what the forward pass keeps for the backward pass.
        working: what else exists at the worst moment.
    """

    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    working: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(vars(self).values())


PIECE = 512  # tokens whose logits exist at a time, see `vocabulary_loss`


def training_memory(
    config: LlamaConfig,
    layout: Layout,
    n_processes: int,
    windows: int,
    sequence: int,
    precision: str = "bf16-mixed",
    written_out: bool = False,
) -> Memory:
    """Bytes on the fullest device while gradients of a batch are accumulated.

    Args:
        config: of the model.
        layout, n_processes: how it is laid out.
        windows, sequence: how many a device gets at a time, and tokens of each.
        precision: Lightning's name; "bf16-mixed" computes in bf16, others in fp32.
        written_out: see `block_activations`.

    Raises:
        ValueError: if the processes or the heads cannot be divided so.
    """
    _, shard, tensor = layout.sizes(n_processes, config)
    number = 2 if precision == "bf16-mixed" else 4
    width, tokens = config.dim, windows * sequence
    piece = min(PIECE, tokens)
    vocabulary = config.vocab_size * width

    held = held_parameters(config, shard, tensor)
    tied = 1 if config.tie_embeddings else 2
    root = tied * vocabulary // tensor + width
    block = (held_parameters(config, 1, tensor) - root) // config.n_layers
    kept = block_activations(config, windows, sequence, tensor, number, written_out)
    last_norm = tokens * (4 * width + 4 + number * width)
    scores = piece * config.vocab_size * (12 if number == 2 else 8)
    loss = last_norm + 2 * number * tokens * width + 4 * vocabulary
    loss += max(scores, scores // 2 + number * vocabulary)
    if tensor > 1:
        loss += number * vocabulary  # the whole output matrix
    backward = tokens * (4 * width + 2 * number * config.hidden_dim // tensor)
    backward += block * (number + 4)  # gradients before and while they are summed
    activations = config.n_layers * kept
    if layout.checkpoint_activations:
        activations = config.n_layers * number * tokens * width
        backward += kept
    return Memory(
        weights=4 * held,
        gradients=4 * held,
        optimizer=8 * held,
        gathered=number * (root + 2 * block),
        activations=activations,
        working=max(loss, backward),
    )


def cache_bytes(
    config: LlamaConfig, windows: int, sequence: int, tensor: int = 1
) -> int:
    """Keys and values on one device while it generates, in bf16."""
    numbers = config.n_layers * config.n_kv_heads * config.head_dim
    return 2 * 2 * numbers * windows * sequence // tensor


def make_mesh(device: str, sizes: tuple[int, int, int]) -> DeviceMesh:
    """All processes in three dimensions, see `Layout.sizes`; neighbours share most."""
    return init_device_mesh(
        device, sizes, mesh_dim_names=("replicate", "shard", "tensor")
    )


def share_products(model: nn.Module, mesh: DeviceMesh) -> None:
    """Divide the matrices of a model on the device "meta" over a tensor group.

    A process has whole heads, some hidden features, and some rows of the vocabulary;
    what is small, such as norms, all of them have and compute alike. Source: Shoeybi
    et al., 2019.
    """
    plan = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
        "layers.*.attention.w[qkv]": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(),
        "layers.*.feed_forward.w[13]": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(),
        "output": ColwiseParallel(output_layouts=Replicate()),
    }
    for llama in find_llamas(model):
        parallelize_module(llama, mesh, plan)
        llama.tok_embeddings.register_forward_hook(_arrived)
        if llama.config.tie_embeddings:
            llama.output.weight = llama.tok_embeddings.weight
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not isinstance(own[0], DTensor):
            distribute_module(module, mesh, input_fn=_enter, output_fn=_leave)


def _arrived(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """Wait for a sum; a compiled block gives one on its way no gradient."""
    return output.clone()


def find_llamas(model: nn.Module) -> list[Llama]:
    """The model itself, or those in it."""
    return [module for module in model.modules() if isinstance(module, Llama)]


def _enter(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
    """Mark a tensor that all processes have alike."""
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)


def _leave(module: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
    """Undo `_enter`."""
    return output.to_local()


def lay_out(
    build: Callable[[], M],
    fill: Callable[[M], None],
    mesh: DeviceMesh,
    layout: Layout,
    dtype: torch.dtype = torch.float32,
) -> M:
    """Make a model of which each process has its part, and never more.

    Args:
        build: makes the model; called for the device "meta".
        fill: gives the parameters their values, one whole parameter at a time.
        mesh: from `make_mesh`.
        layout: what else to do.
        dtype: of weights while they compute; they are stored, and their gradients
            summed, in fp32.
    """
    with torch.device("meta"):
        model: Any = build()
    policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    is_hybrid = mesh["replicate"].size() > 1
    data = mesh["replicate", "shard"] if is_hybrid else mesh["shard"]
    shard = partial(fully_shard, mesh=data, mp_policy=policy)
    is_shared = mesh["tensor"].size() > 1
    if is_shared:
        share_products(model, mesh["tensor"])
    for llama in find_llamas(model):
        for block in llama.layers:
            if layout.checkpoint_activations:
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
            if layout.compile:
                # DTensor's backward pass cannot have sizes that are symbols
                block.compile(dynamic=False if is_shared else None)
            shard(block)
    shard(model)
    model.to_empty(device=mesh.device_type)
    with implicit_replication():
        fill(model)
    return model


@dataclass(frozen=True)
class Gpu:
    """What a data sheet says about a device.

    Attributes:
        memory: in GiB.
        flops: dense bf16 operations per second.
        bandwidth: of its memory, bytes per second.
        watts: the most that it draws.
    """

    memory: float
    flops: float
    bandwidth: float
    watts: float


GPUS = {
    "a100-40gb": Gpu(40, 312e12, 1.555e12, 400),
    "a100-80gb": Gpu(80, 312e12, 2.039e12, 400),
    "h100-80gb": Gpu(80, 989e12, 3.35e12, 700),
    "h200-141gb": Gpu(140, 989e12, 4.8e12, 700),
    "rtx4090-24gb": Gpu(24, 165e12, 1.008e12, 450),
}
PUE = 1.1  # energy of a data centre for each unit that its computers draw
CARBON = 0.385  # kg CO2eq for each kWh; both inferred from the paper's Table 2


def flops_per_token(config: LlamaConfig, sequence: int = 0) -> int:
    """Operations of training on a token: 6 for each parameter, and attention.

    A token looks at half a window on average, in two products of the model's width for
    each block, forward once and backward twice. Source: Chowdhery et al., 2022,
    appendix B, who count whole windows.

    Args:
        config: of the model.
        sequence: tokens of a window; 0 to leave attention out.
    """
    attention = 6 * config.n_layers * config.n_heads * config.head_dim * sequence
    return 6 * config.parameter_count() + attention


def utilisation(flops: float, gpu_hours: float, gpu: Gpu) -> float:
    """Share of the most that the devices could have done: MFU.

    Args:
        flops: operations that the training needs, those done twice counted once.
        gpu_hours: hours that it took, times devices.
        gpu: the device.
    """
    return flops / (gpu_hours * 3600 * gpu.flops)


def carbon_tonnes(gpu_hours: float, watts: float) -> float:
    """Tonnes of CO2 equivalent, as in the paper's Table 2."""
    return gpu_hours * watts / 1000 * PUE * CARBON / 1000


def accumulation(batch: int, groups: int, at_most: int) -> int:
    """Parts in which each group of processes takes its share of a batch: the fewest.

    Args:
        batch: windows of a batch over all processes.
        groups: of processes that get windows of their own.
        at_most: windows that a group can take at a time.

    Raises:
        ValueError: if the groups cannot share the batch evenly.
    """
    share, rest = divmod(batch, groups)
    if at_most < 1:
        raise ValueError(
            f"a device must take at least 1 window at a time, not {at_most}"
        )
    if rest or not share:
        near = groups * max(1, round(batch / groups))
        raise ValueError(
            f"a batch of {batch:,} windows / {groups:,} groups of processes = "
            f"{batch / groups:.2f} windows for each; a batch of {near:,} would do"
        )
    fits = (n for n in range(1, share + 1) if share % n == 0 and share // n <= at_most)
    return next(fits)
