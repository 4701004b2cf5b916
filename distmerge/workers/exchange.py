"""The exchange: every worker receives all workers' values of its own share, reduces them, and sends the result to all.

Each of M workers sends as many bytes as in an all-reduce, ``2 b (M - 1) / M``, but the owner of a share may compute anything
from the M rows, such as a mean, a median or an outer step. On a quantised wire values are rounded twice, once on the way to
the owner and once on the way back, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.rules.mean import WeightedMean
from distmerge.rules.protocol import Block
from distmerge.theta.flat import pieces
from distmerge.workers.codec import Row
from distmerge.workers.collectives import floats
from distmerge.workers.group import WorkerGroup
from distmerge.workers.pending import WEIGHT_BYTES, wait, weigh
from distmerge.workers.scratch import Scratch
from distmerge.workers.shares import Shares, equal_shares
from distmerge.workers.wire import Wire

Reduce = Callable[[list[Tensor], Tensor, Tensor], None]
"""``reduce(rows, weights [M], out [n])`` writes a share's result, from the rows ``[n]`` float32 of all M workers. ``out`` may
be the memory of this worker's own row, so an element must be written only after everything that depends on it was read."""


class Exchange:
    """An exchange in progress. On a float32 wire values travel directly between their places in the messages, without copies.

    Args:
        message: ``[n + 1]`` float32: this worker's values, then the result; the last element is the weight.
        weight: this worker's weight. With weight 0 it takes part, but its values do not count, finite or not.
        residual: the rounding errors that error feedback keeps: of the rows that this worker sent ``[sum of shares.rows]``, and
            of the results that it sent as an owner. Both are added to the next message and replaced by that message's errors.
            A worker of weight 0 sends no values of its own and keeps the first part.
        reduce: what the owner of a share computes; by default the weighted mean.
        then: what the owner does in place with its share of a weighted mean before sending it back, such as an outer step.
        scratch: the pool that buffers are taken from and given back to.
    """

    def __init__(
        self,
        workers: WorkerGroup,
        message: Tensor,
        weight: float,
        wire: Wire,
        residual: tuple[Tensor, Tensor] | None = None,
        reduce: Reduce | None = None,
        then: Callable[[Tensor], None] | None = None,
        shares: Shares | None = None,
        scratch: Scratch | None = None,
    ):
        self.workers, self.message, self.wire, self.residual, self.then = workers, message, wire, residual, then
        self.reduce, self.scratch = reduce, scratch or Scratch(message.device)
        self.shares = shares or equal_shares(message.numel() - 1, workers.size)
        self.waited, self._stage = 0.0, 1
        weigh(message, weight)
        self._weights = message[-1:].expand(workers.size).clone()
        self._own, self._counts = workers.rank, weight > 0 or weight != weight
        outgoing, self._incoming = self._outgoing_rows(), self._incoming_rows()
        sends = [(peer, part) for peer, row in enumerate(outgoing) for part in (row, message[-1:])]
        receives = [(peer, part) for peer, row in enumerate(self._incoming) for part in (row, self._weights[peer : peer + 1])]
        sent = sum(row.numel() * row.element_size() + WEIGHT_BYTES for row in outgoing)
        own = outgoing[self._own].numel() * outgoing[self._own].element_size() + WEIGHT_BYTES
        workers.ledger.exchange(sent - own, payload_bytes=sent)
        self._works = begin(workers, sends, receives)
        self._outgoing = outgoing  # the sends read it until they are done

    def advance(self) -> None:
        """Reduce this worker's share and begin to send the result to all. All workers call it at the same step."""
        if self._stage != 1:
            return
        self.waited += wait(self._works)
        own = self._slice(self._own)
        if self.wire.name == "fp32":
            self._reduce_rows(self._incoming, own)
            self._release(row for peer, row in enumerate(self._incoming) if peer != self._own)
            result = own
        else:
            mean = self.scratch.take(self.shares.rows[self._own], torch.float32).zero_()
            self._reduce_encoded(mean)
            self._release({id(row): row for row in (*self._incoming, *self._outgoing)}.values())
            result = self.scratch.take(self.wire.size_bytes(len(mean)), torch.uint8)
            Row(self.wire, result, len(mean)).encode(mean, self.residual[1] if self.residual else None)
            self.scratch.give(mean)
        self._incoming = self._results(result)
        peers = [peer for peer in range(self.workers.size) if peer != self._own]
        self.workers.ledger.exchange(len(peers) * result.numel() * result.element_size())
        self._works = begin(self.workers, [(peer, result) for peer in peers], list(enumerate(self._incoming)))
        self._stage = 2

    def finish(self) -> None:
        """Wait until ``message`` holds the result. Its last element, to divide by, is then 1, or 0 if no worker counts."""
        self.advance()
        if self._stage != 2:
            return
        self.waited += wait(self._works)
        if self.wire.name != "fp32":
            for peer, row in enumerate(self._incoming):
                Row(self.wire, row, self.shares.rows[peer]).decode(self._slice(peer))
            self._release(self._incoming)
        if bool(self._weights.isnan().any()):  # the sender refuses to be merged: all see it, even if the wire loses NaN
            self.message.fill_(torch.nan)
        self.message[-1] = ~(self._weights.sum() <= 0)
        self._stage = 3

    def _slice(self, peer: int) -> Tensor:
        start, stop = self.shares.bounds[peer]
        return self.message[start:stop]

    def _outgoing_rows(self) -> list[Tensor]:
        """The part of this worker's values that each worker receives."""
        if self.wire.name == "fp32":
            return [self._slice(peer) for peer in range(self.workers.size)]
        rows: list[Tensor] = []
        at = 0
        for peer, numel in enumerate(self.shares.rows):
            row = self.scratch.take(self.wire.size_bytes(numel), torch.uint8)
            kept = self.residual[0][at : at + numel] if self.residual and self._counts else None
            Row(self.wire, row, numel).encode(self._slice(peer), kept)
            rows.append(row)
            at += numel
        return rows

    def _incoming_rows(self) -> list[Tensor]:
        """Memory for all workers' values of this worker's share. Its own row stays where it is."""
        if self.wire.name == "fp32":
            start, stop = self.shares.bounds[self._own]
            fresh = (self.scratch.take(stop - start, torch.float32) for _ in range(self.workers.size))
            return [self._slice(self._own) if peer == self._own else next(fresh) for peer in range(self.workers.size)]
        size = self.wire.size_bytes(self.shares.rows[self._own])
        return [self.scratch.take(size, torch.uint8) for _ in range(self.workers.size)]

    def _results(self, own: Tensor) -> list[Tensor]:
        """Memory for the result of every share."""
        if self.wire.name == "fp32":
            return [self._slice(peer) for peer in range(self.workers.size)]
        rows = self.shares.rows
        return [
            own if peer == self._own else self.scratch.take(self.wire.size_bytes(rows[peer]), torch.uint8)
            for peer in range(self.workers.size)
        ]

    def _reduce_rows(self, rows: list[Tensor], out: Tensor) -> None:
        if self.reduce is not None:
            self.reduce(rows, self._weights, out)
            return
        write_mean(rows, floats(self._weights), out)
        if self.then is not None:
            self.then(out)

    def _reduce_encoded(self, out: Tensor) -> None:
        """Reduce rows in the wire's format. A mean decodes one row after the other and never holds all of them as floats."""
        rows = [Row(self.wire, row, len(out)) for row in self._encoded()]
        if self.reduce is None:
            for row, weight in zip(rows, floats(self._weights), strict=True):
                row.add_to(out, weight)
            out.div_(self._weights.sum())
            if self.then is not None:
                self.then(out)
            return
        start, stop = self.shares.bounds[self._own]
        decoded = [self.scratch.take(len(out), torch.float32) for _ in rows]
        for row, values in zip(rows, decoded, strict=True):
            row.decode(values)
        self.reduce([values[: stop - start] for values in decoded], self._weights, out[: stop - start])
        self.scratch.give(*decoded)

    def _encoded(self) -> Sequence[Tensor]:
        return [self._outgoing[peer] if peer == self._own else row for peer, row in enumerate(self._incoming)]

    def _release(self, rows: Iterable[Tensor]) -> None:
        self.scratch.give(*rows)


def begin(workers: WorkerGroup, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]]) -> list[dist.Work]:
    """Begin to send to and receive from the other workers. All of them call it in the same order, with matching sizes."""
    wanted = [(dist.isend, sends), (dist.irecv, receives)]
    operations = [
        dist.P2POp(operation, part, group=workers.group, group_peer=peer)
        for operation, parts in wanted
        for peer, part in parts
        if peer != workers.rank and part.numel()
    ]
    return dist.batch_isend_irecv(operations) if operations else []


def write_mean(rows: list[Tensor], weights: list[float], out: Tensor) -> None:
    """Write the weighted mean of the rows into ``out``, in pieces that fit a cache; ``out`` may be one of the rows."""
    rule = WeightedMean(weights)
    for here in pieces(out, 0, len(out)):
        out[here] = rule.merge(Block([row[here] for row in rows], None, here.start, 0), None)
