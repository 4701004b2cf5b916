"""A spy on torch.distributed: what really travels, by the tensors themselves, to hold against a ledger's own count."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """Attributes: bytes_sent: what leaves this rank under the standard algorithms."""

    collectives: int = 0
    bytes_sent: float = 0.0


def size(tensors: Tensor | list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in ([tensors] if isinstance(tensors, Tensor) else tensors))


COSTS: dict[str, Callable[[float, tuple], float]] = {
    "all_reduce": lambda share, tensors: 2 * share * size(tensors[0]),
    "broadcast": lambda share, tensors: share * size(tensors[0]),
    "all_gather": lambda share, tensors: share * size(tensors[0]),
    "all_gather_into_tensor": lambda share, tensors: share * size(tensors[0]),
    "all_gather_single": lambda share, tensors: share * size(tensors[0]),
    "reduce_scatter_tensor": lambda share, tensors: share * size(tensors[1]),
    "all_to_all_single": lambda share, tensors: share * size(tensors[1]),
}
"""The bytes that leave a rank, of (M - 1) / M and the call's positional arguments."""


@contextlib.contextmanager
def counted(group: dist.ProcessGroup | None = None) -> Iterator[Traffic]:
    """Count the calls over ``group`` (the default group, where it is None); every call is really made."""
    traffic = Traffic()
    watched: Any = group or dist.group.WORLD
    peers = dist.get_world_size(watched)

    def spied(name: str, real: Callable) -> Callable:
        def call(*tensors: Any, **options: Any) -> Any:
            assert all(isinstance(t, Tensor | list | int) for t in tensors), f"{name} takes its group by name"
            if (options.get("group") or dist.group.WORLD) is watched:
                traffic.collectives += 1
                traffic.bytes_sent += COSTS[name]((peers - 1) / peers, tensors)
            return real(*tensors, **options)

        return call

    exchange = dist.batch_isend_irecv

    def spied_exchange(operations: list[dist.P2POp]) -> Any:
        """Point-to-point messages that belong together count as one collective."""
        if operations[0].group is watched:
            traffic.collectives += 1
            traffic.bytes_sent += sum(size(one.tensor) for one in operations if one.op is dist.isend)
        return exchange(operations)

    gather = dist.all_gather_object

    def spied_gather(answers: list[Any], said: Any, group: Any = None) -> None:
        if (group or dist.group.WORLD) is watched:
            traffic.collectives += 1
            traffic.bytes_sent += len(pickle.dumps(said)) * (peers - 1)
        gather(answers, said, group=group)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(dist, "all_gather_object", spied_gather))
        stack.enter_context(mock.patch.object(dist, "batch_isend_irecv", spied_exchange))
        for name in filter(partial(hasattr, dist), COSTS):
            stack.enter_context(mock.patch.object(dist, name, spied(name, getattr(dist, name))))
        yield traffic
