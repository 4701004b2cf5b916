"""Means over the peers that are under way: begun at one step, finished at the same or a later one.

Every flight carries a message ``[n + 1]`` float32: values, and room for this worker's weight. After :meth:`finish`, on
every peer with the same bits, ``message[:-1] / message[-1]`` is the weighted mean. A worker of weight 0 takes part in the
collectives, but its values, finite or not, don't count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.errors import UserError
from distmerge.workers.codec import Row
from distmerge.workers.divergence import Spread
from distmerge.workers.group import Peers
from distmerge.workers.scratch import Rooms
from distmerge.workers.wire import BLOCK, Wire

WEIGHT_BYTES = 4
"""A worker's weight travels as a float32."""


class Flight(Protocol):
    """A mean under way.

    Attributes:
        message: where the result will be.
        waited: seconds that this rank was blocked for it.
    """

    message: Tensor
    waited: float

    def advance(self) -> None:
        """Begin the second half, if there is one; called by all peers at the same step."""
        ...

    def finish(self) -> None: ...


class AllReduce:
    """Float32 values in one all-reduce; the weight rides along."""

    def __init__(self, peers: Peers, message: Tensor, weight: float):
        self.message, self.waited = message, 0.0
        weigh(message, weight)
        if weight not in (0, 1):
            message[:-1].mul_(weight)
        self._work = peers.begin_total(message)

    def advance(self) -> None:
        pass

    def finish(self) -> None:
        self.waited += wait(self._work)


class Exchange:
    """Values in a wire format: all-to-all, reduce in float32, all-gather.

    Each peer reduces one share of the vector, so values are quantised twice whatever the number of workers. With
    ``residual`` (one for each of the two, zero at first), what rounding left over is added to the next message.

    ``owner`` is what a peer does to the mean of its share before it goes out to all: nothing, or the outer step. Buffers come
    from ``rooms`` and go back there.
    """

    def __init__(
        self,
        peers: Peers,
        message: Tensor,
        weight: float,
        wire: Wire,
        residual: tuple[Tensor, Tensor] | None = None,
        owner: Callable[[Tensor], None] | None = None,
        rooms: Rooms | None = None,
    ):
        self.peers, self.message, self.wire, self.residual, self.owner = peers, message, wire, residual, owner
        self.rooms = rooms or Rooms(message.device)
        self.waited = 0.0
        self.share = share_numel(message.numel() - 1, peers.size)
        self.row_bytes = wire.size_bytes(self.share)
        self._stage = 1
        weigh(message, weight)
        outgoing, self._incoming = (self._room(self.row_bytes + WEIGHT_BYTES) for _ in range(2))
        for peer, (row, values) in enumerate(zip(outgoing, self._shares(), strict=True)):
            place = slice(peer * self.share, (peer + 1) * self.share)
            Row(wire, row[: self.row_bytes], self.share).encode(values, residual[0][place] if residual else None)
        # The weight goes beside the values and not into them: the format's error must not depend on it.
        outgoing[:, self.row_bytes :] = message[-1:].view(torch.uint8)
        peers.ledger.gather(outgoing.numel())
        self._work = dist.all_to_all_single(self._incoming.view(-1), outgoing.view(-1), group=peers.group, async_op=True)
        self._outgoing = outgoing  # must live as long as the collective reads it

    def advance(self) -> None:
        if self._stage != 1:
            return
        self.waited += wait(self._work)
        weights = self._incoming[:, self.row_bytes :].contiguous().view(torch.float32).view(-1)
        mean = self.rooms.take(self.share, torch.float32).zero_()
        for row, weight in zip(self._incoming, weights.tolist(), strict=True):
            Row(self.wire, row[: self.row_bytes], self.share).add_to(mean, weight)
        self._weights = weights.sum()
        mean.div_(self._weights)
        self.rooms.give(self._incoming, self._outgoing)
        if self.owner is not None:
            self.owner(mean)
        encoded, self._incoming = self.rooms.take(self.row_bytes, torch.uint8), self._room(self.row_bytes)
        Row(self.wire, encoded, self.share).encode(mean, self.residual[1] if self.residual else None)
        self.rooms.give(mean)
        self.peers.ledger.gather(self._incoming.numel(), payload=False)
        # torch 2.13 renamed it, and warns at each use of the old name.
        gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
        self._work = gather(self._incoming.view(-1), encoded, group=self.peers.group, async_op=True)
        self._outgoing = encoded
        self._stage = 2

    def finish(self) -> None:
        self.advance()
        if self._stage == 2:
            self.waited += wait(self._work)
            for row, values in zip(self._incoming, self._shares(), strict=True):
                Row(self.wire, row, self.share).decode(values)
            self.message[-1] = self._weights > 0
            self.rooms.give(self._incoming, self._outgoing)
            self._stage = 3

    def _shares(self) -> list[Tensor]:
        """Each peer's share of the message: views, of which the last ones may be shorter or empty."""
        values = self.message[:-1]
        return [values[peer * self.share : (peer + 1) * self.share] for peer in range(self.peers.size)]

    def _room(self, row_bytes: int) -> Tensor:
        """``[peers, row_bytes]`` uint8."""
        return self.rooms.take(self.peers.size * row_bytes, torch.uint8).view(self.peers.size, row_bytes)


class Landed:
    """A flight that had finished when the state was saved."""

    def __init__(self, message: Tensor):
        self.message, self.waited = message, 0.0

    def advance(self) -> None:
        pass

    def finish(self) -> None:
        pass


def weigh(message: Tensor, weight: float) -> None:
    """Write the weight into the message; values of no weight may be NaN, so they are cleared."""
    if weight == 0:
        message[:-1].zero_()
    message[-1] = weight


@dataclass
class InFlight:
    """A fragment that was sent and not yet applied."""

    fragment: int
    flights: list[Flight]
    spread: Spread
    weight: float
    steps: int

    def wait(self) -> None:
        """Until all that is under way has arrived; called by all peers together."""
        for flight in self.flights:
            flight.finish()
        self.spread.wait()

    def state_dict(self) -> dict[str, Any]:
        """What is left to apply, once all that is under way has arrived; called by all peers together."""
        self.wait()
        return {
            "fragment": self.fragment,
            "messages": [flight.message for flight in self.flights],
            "spread": self.spread.state_dict(),
            "weight": self.weight,
            "steps": self.steps,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> InFlight:
        spread = Spread(device)
        spread.load_state_dict(state["spread"])
        flights: list[Flight] = [Landed(message.to(device)) for message in state["messages"]]
        return cls(state["fragment"], flights, spread, state["weight"], state["steps"])


def total_weight(flight: Flight) -> Tensor:
    """The sum of the workers' weights, by which a finished flight's values are to be divided."""
    weights = flight.message[-1].clone()
    if not weights > 0:
        raise UserError("every worker is out of order (weight 0), so there is nothing to merge")
    return weights


def share_numel(numel: int, peers: int) -> int:
    """Elements that each peer reduces, a multiple of the wire's block."""
    return -(-numel // (peers * BLOCK)) * BLOCK


def wait(work: dist.Work | None) -> float:
    """Seconds blocked until ``work`` is done."""
    began = time.perf_counter()
    if work is not None:
        work.wait()
    return time.perf_counter() - began
