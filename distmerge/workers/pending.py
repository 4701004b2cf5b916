"""Pending reduces: means over the workers that are begun at one step and finished at the same or a later one.

Every pending reduce has a message ``[n + 1]`` float32: the values, and this worker's weight. After :meth:`finish`,
``message[:-1] / message[-1]`` is the weighted mean, with the same bits on every worker. A worker of weight 0 takes part in the
collectives, but its values do not count, finite or not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.errors import UserError
from distmerge.finite import finite
from distmerge.workers.background import StageThread
from distmerge.workers.divergence import Divergence
from distmerge.workers.group import WorkerGroup
from distmerge.workers.saved import check_keys

WEIGHT_BYTES = 4
"""A worker's weight travels as a float32."""


class PendingReduce(Protocol):
    """A mean that is being computed.

    Attributes:
        message: holds the result in the end.
        waited: seconds that this rank was blocked, waiting for it.
    """

    message: Tensor
    waited: float

    def advance(self) -> None:
        """Begin the second half, if there is one. All workers call it at the same step."""
        ...

    def sent(self) -> None:
        """Wait until this worker's values are on their way, which depends on no other worker."""
        ...

    def finish(self) -> None:
        """Wait until ``message`` holds the result."""
        ...

    def is_finite(self) -> bool:
        """Whether the result is finite, after :meth:`finish`."""
        ...


class AllReduce:
    """Float32 values in one all-reduce, with the weight as the last element.

    Args:
        thread: waits for the result and looks whether it is finite, while the caller goes on.
    """

    def __init__(self, workers: WorkerGroup, message: Tensor, weight: float, thread: StageThread | None = None):
        self.message, self.waited = message, 0.0
        self._finite: bool | None = None
        weigh(message, weight)
        if weight not in (0, 1):
            message[:-1].mul_(weight)
        self._work = workers.begin_total(message)
        self._job = None if thread is None else thread.begin(self._run())

    def _run(self) -> Iterator[None]:
        yield  # other buckets may be encoded first
        wait([self._work])
        self._finite = finite(self.message)

    def advance(self) -> None:
        pass

    def sent(self) -> None:
        pass

    def finish(self) -> None:
        self.waited += wait([self._work]) if self._job is None else self._job.wait()

    def is_finite(self) -> bool:
        return finite(self.message) if self._finite is None else self._finite


class CompletedReduce:
    """A reduce that had finished when the state was saved."""

    def __init__(self, message: Tensor):
        self.message, self.waited = message, 0.0

    def advance(self) -> None:
        pass

    def sent(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def is_finite(self) -> bool:
        return finite(self.message)


def weigh(message: Tensor, weight: float) -> None:
    """Write the weight into the message. Values of weight 0 are cleared, since they may be NaN."""
    if weight == 0:
        message[:-1].zero_()
    message[-1] = weight


@dataclass
class PendingFragment:
    """A fragment that was sent and not yet applied."""

    fragment: int
    pending: list[PendingReduce]
    divergence: Divergence
    weight: float
    steps: int

    def advance(self) -> None:
        """Begin the second half of its reduces. All workers call it at the same step."""
        for pending in self.pending:
            pending.advance()

    def sent(self) -> None:
        """Wait until this worker's values are on their way, which depends on no other worker."""
        for pending in self.pending:
            pending.sent()

    def wait(self) -> None:
        """Wait until everything in flight has arrived. All workers call it at the same step."""
        for pending in self.pending:
            pending.finish()
        self.divergence.wait()

    def state_dict(self) -> dict[str, Any]:
        """What remains to be applied. It waits for everything in flight, so all workers call it at the same step."""
        self.wait()
        return {
            "fragment": self.fragment,
            "messages": [pending.message for pending in self.pending],
            "spread": self.divergence.state_dict(),
            "weight": self.weight,
            "steps": self.steps,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any] | None, device: torch.device) -> PendingFragment | None:
        """The fragment that was in flight when ``state`` was saved; None where there was none."""
        if state is None:
            return None
        check_keys(state, ("fragment", "messages", "spread", "weight", "steps"), "the fragment in flight")
        divergence = Divergence(device)
        divergence.load_state_dict(state["spread"])
        pending: list[PendingReduce] = [CompletedReduce(message.to(device)) for message in state["messages"]]
        return cls(state["fragment"], pending, divergence, state["weight"], state["steps"])


def total_weight(pending: PendingReduce) -> Tensor:
    """The sum of the workers' weights, by which the values of a finished reduce must be divided."""
    weights = pending.message[-1].clone()
    if not weights > 0:
        raise UserError("every worker is out of order (weight 0), so there is nothing to merge")
    return weights


def wait(works: Sequence[dist.Work | None]) -> float:
    """Wait for all of the work; the seconds that this took."""
    began = time.perf_counter()
    for work in works:
        if work is not None:
            work.wait()
    return time.perf_counter() - began
