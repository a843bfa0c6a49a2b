"""`llama2-lite plan`: what a training takes in memory, time, energy and carbon."""

import math
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace

from llama2_lite.model import LlamaConfig
from llama2_lite.runtime.counts import count_windows, parse_count
from llama2_lite.scaling import (
    GPUS,
    PUE,
    Layout,
    Memory,
    accumulation,
    cache_bytes,
    carbon_tonnes,
    flops_per_token,
    held_parameters,
    training_memory,
    utilisation,
)

RESERVED = 0.05  # of a GPU's memory, for the driver and for gaps between tensors
GIB = 2**30
USUAL_MFU = 0.4  # what the command takes if none is given


def check_options(options: Namespace) -> None:
    """Refuse what is out of range.

    Raises:
        ValueError: it names the option.
    """
    if options.gpu not in GPUS:
        raise ValueError(f"no GPU {options.gpu!r}; there are {', '.join(GPUS)}")
    for name in ("gpus", "sequence", "device_batch", "gpu_hours", "watts"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            key = name.replace("_", "-")
            raise ValueError(f"--{key} must be positive, but is {value:g}")
    if options.mfu is not None and not 0 < options.mfu <= 1:
        raise ValueError(f"--mfu is a share between 0 and 1, not {options.mfu:g}")
    if options.gpu_hours is not None and options.mfu is not None:
        raise ValueError("--mfu and --gpu-hours say the same: give one of them")


def plan(options: Namespace) -> str:
    """What training with these options takes, as text.

    Raises:
        ValueError: if the options are out of range or do not fit together.
    """
    check_options(options)
    config, gpu = LlamaConfig.preset(options.model), GPUS[options.gpu]
    layout = Layout(shard=options.shard, tensor=options.tp)
    sequence = options.sequence or config.max_seq_len
    tokens = parse_count(options.tokens, 1000)
    batch = parse_count(options.batch_tokens, 1024)
    try:
        copies, shard, tensor = layout.sizes(options.gpus, config)
    except ValueError as error:  # it knows the names in configurations only
        message = str(error).replace("layout.tensor", "--tp")
        raise ValueError(message.replace("layout.shard", "--shard")) from error
    groups, windows = copies * shard, count_windows(batch, sequence)
    parts = accumulation(windows, groups, options.device_batch)
    at_once = windows // (groups * parts)

    lines = [
        f"{options.model}: {config.parameter_count():,} parameters on "
        f"{options.gpus:,} x {options.gpu}",
        f"copies of the model: {copies:,}, each in {shard:,} parts; GPUs that share "
        f"each product: {tensor}",
        f"a batch: {batch:,} tokens = {windows:,} windows of {sequence:,} = "
        f"{groups:,} groups x {at_once:,} at a time x {parts:,}",
        "",
    ]
    cases = [replace(layout, checkpoint_activations=again) for again in (False, True)]
    kept, again = (
        training_memory(config, case, options.gpus, at_once, sequence) for case in cases
    )
    room = gpu.memory * (1 - RESERVED)
    lines += memory_table(kept, again, gpu.memory)
    if kept.total > room * GIB:
        lines += advise(config, layout, options, at_once, windows, sequence, again)
    lines += ["", *generation(config, tensor, room, sequence), ""]
    return "\n".join(lines + cost_table(config, options, tokens, batch, sequence))


def memory_table(kept: Memory, again: Memory, gib: float) -> Iterator[str]:
    """Memory by kind, without and with activation checkpointing."""
    yield f"{'GiB on each GPU, blocks':26}{'kept':>13}{'computed again':>16}"
    for name, first in vars(kept).items():
        second = getattr(again, name)
        yield f"{name:26}{first / GIB:13.2f}{second / GIB:16.2f}"
    yield f"{'total':26}{kept.total / GIB:13.2f}{again.total / GIB:16.2f}"
    room = gib * (1 - RESERVED)
    words = [
        "fits" if memory.total <= room * GIB else "does not fit"
        for memory in (kept, again)
    ]
    yield f"{f'{room:.1f} of {gib:g} GiB are free':26}{words[0]:>13}{words[1]:>16}"


def advise(
    config: LlamaConfig,
    layout: Layout,
    options: Namespace,
    at_once: int,
    windows: int,
    sequence: int,
    again: Memory,
) -> Iterator[str]:
    """Why it does not fit, and the smallest change after which it does."""
    room = GPUS[options.gpu].memory * (1 - RESERVED) * GIB
    if again.total <= room:
        yield "Activations are too many: compute blocks again (checkpoint_activations)."
        return
    name, most = max(vars(again).items(), key=lambda item: item[1])
    yield (
        f"Even with blocks computed again it lacks {(again.total - room) / GIB:.1f} "
        f"GiB; the largest part is {name}, {most / GIB:.1f} GiB."
    )
    more = [2**n for n in range(1, 13)]
    tries = [(tp, options.gpus, at_once) for tp in (2, 4, 8) if tp > layout.tensor]
    tries += [(layout.tensor, options.gpus, n) for n in (at_once // 2, 1) if n]
    tries += [(layout.tensor, options.gpus * n, at_once) for n in more]
    tries += [(8, options.gpus * n, 1) for n in more]
    for tensor, n_gpus, n in tries:
        case = replace(layout, tensor=tensor, shard=0, checkpoint_activations=True)
        try:
            copies, shard, _ = case.sizes(n_gpus, config)
            accumulation(windows, copies * shard, n)
            memory = training_memory(config, case, n_gpus, n, sequence)
        except ValueError:  # the heads, the GPUs or the batch cannot be divided so
            continue
        if memory.total <= room:
            over_all = " --shard 0" if layout.shard else ""
            yield (
                f"With --gpus {n_gpus} --tp {tensor}{over_all} --device-batch {n} and "
                f"blocks computed again it takes {memory.total / GIB:.1f} GiB."
            )
            return
    yield (
        "No number of these GPUs is enough for such batches: take larger GPUs, larger "
        "batches or shorter windows."
    )


def generation(
    config: LlamaConfig, tensor: int, room: float, sequence: int
) -> Iterator[str]:
    """What generating takes on the GPUs that share each product."""
    weights = 2 * held_parameters(config, 1, tensor) / GIB
    cache = cache_bytes(config, 1, sequence, tensor) / GIB
    name = f"generating on {tensor} GPU{'s' * (tensor > 1)}"
    yield (
        f"{name:26}{weights:13.2f} GiB of weights in bf16, and for each "
        f"{sequence:,} tokens {cache:.2f} of cache"
    )
    fit = int((room - weights) / cache)
    yield f"{'':26}{max(0, fit):13,} such conversations fit"


def cost_table(
    config: LlamaConfig, options: Namespace, tokens: int, batch: int, sequence: int
) -> list[str]:
    """Operations, hours, energy and carbon.

    Raises:
        ValueError: if no such GPU is fast enough for the hours.
    """
    gpu = GPUS[options.gpu]
    flops = tokens * flops_per_token(config, sequence)
    without = tokens * flops_per_token(config)
    least = flops / (gpu.flops * 3600)
    hours = options.gpu_hours or least / (options.mfu or USUAL_MFU)
    if hours < least:
        raise ValueError(
            f"--gpu-hours must be at least {math.ceil(least):,}, which is an MFU of "
            f"100%, but is {hours:g}"
        )
    watts = options.watts or gpu.watts
    shares = [utilisation(n, hours, gpu) for n in (flops, without)]
    return [
        f"{'tokens':26}{tokens:13.3g} in {-(-tokens // batch):,} steps",
        f"{'FLOPs, 6 N a token':26}{without:13.3g}",
        f"{'FLOPs with attention':26}{flops:13.3g}",
        f"{'MFU with attention':26}{shares[0]:13.1%} ({shares[1]:.1%} by 6 N)",
        f"{'GPU hours':26}{hours:13,.0f}",
        f"{'days':26}{hours / options.gpus / 24:13,.1f}",
        f"{'energy, MWh':26}{hours * watts * PUE / 1e6:13,.1f} at {watts:g} W for each "
        f"GPU, and {PUE - 1:.0%} for the building",
        f"{'carbon, t CO2eq':26}{carbon_tonnes(hours, watts):13,.2f}",
    ]
