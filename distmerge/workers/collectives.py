"""torch calls whose stubs leave types unknown, with the types that they have. Every cast of this package is in this file."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_dist = cast("Any", dist)


def all_reduce(x: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Reduce ``x`` over the group, in place; every rank ends with the same bits."""
    _dist.all_reduce(x, op=op, group=group)


def begin_all_reduce(x: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Begin to sum ``x`` over the group; it holds the sum once the work has been waited for."""
    return cast("dist.Work | None", _dist.all_reduce(x, group=group, async_op=True))


def all_gather(received: list[Tensor], x: Tensor, group: dist.ProcessGroup) -> None:
    """Fill ``received`` with every rank's ``x``, in the order of the ranks."""
    _dist.all_gather(received, x, group=group)


def all_gather_object(value: T, group: dist.ProcessGroup) -> list[T]:
    """Every rank's ``value``, which is pickled, in the order of the ranks."""
    received: list[Any] = [None] * dist.get_world_size(group)
    _dist.all_gather_object(received, value, group=group)
    return cast("list[T]", received)


def floats(x: Tensor) -> list[float]:
    """The elements of ``x [n]`` as Python's numbers. Reading them waits for the device."""
    return cast("list[float]", cast("Any", x).tolist())
