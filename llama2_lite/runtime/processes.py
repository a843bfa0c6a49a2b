"""What the processes of one run do together."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def is_first() -> bool:
    """Whether this is the first of the processes, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_divided(model: nn.Module) -> bool:
    """Whether each process has only a part of the parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def in_first(action: Callable[[], T]) -> T:
    """Do something in the first process; all of them get what it gives, or its error.

    Each process has to call this.
    """
    outcome: list[Any] = [None, None]
    if is_first():
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if dist.is_initialized():
        dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    found: T = outcome[0]
    return found


def in_all(action: Callable[[], T]) -> list[T]:
    """Do something in each process; all get what each gives, in order, or an error.

    Each process has to call this. Of several errors it is the first process's.
    """
    outcome: list[Any] = [None, None]
    try:
        outcome[0] = action()
    except Exception as error:
        outcome[1] = error
    outcomes = from_all(outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [value for value, _ in outcomes]


def own_share(items: Sequence[T]) -> Sequence[T]:
    """Those of the items that this process sees to: of n processes every n-th."""
    if not dist.is_initialized():
        return items
    return items[dist.get_rank() :: dist.get_world_size()]


def from_all(value: T) -> list[T]:
    """The values of all processes, in order. Each process has to call this."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
