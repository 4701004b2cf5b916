"""The exchange: every worker receives all workers' values of its own share, reduces them, and sends the result to all.

Each of M workers sends as many bytes as in an all-reduce, ``2 b (M - 1) / M``, but the owner of a share may compute anything
from the M rows, such as a mean, a median or an outer step. On a quantised wire values are rounded twice, once on the way to
the owner and once on the way back, whatever the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.finite import finite
from distmerge.rules.mean import WeightedMean
from distmerge.rules.protocol import Block
from distmerge.theta.flat import pieces
from distmerge.workers.background import StageThread
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

    It has three stages: send the own values; reduce the own share once all workers' values have arrived, and send the result;
    read the results.

    Args:
        message: ``[n + 1]`` float32: this worker's values, then the result; the last element is the weight.
        weight: this worker's weight. With weight 0 it takes part, but its values do not count, finite or not.
        residual: the rounding errors that error feedback keeps: of the rows that this worker sent ``[sum of shares.rows]``, and
            of the results that it sent as an owner. Both are added to the next message and replaced by that message's errors.
            A worker of weight 0 sends no values of its own and keeps the first part.
        reduce: what the owner of a share computes; by default the weighted mean.
        then: what the owner does in place with its share of a weighted mean before sending it back, such as an outer step.
        scratch: the pool that buffers are taken from and given back to.
        thread: runs all stages while the caller goes on, encoding and decoding included; without it the caller runs them.
            Nothing else may use ``scratch`` meanwhile. A ``reduce`` or ``then`` of its own needs the caller.
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
        thread: StageThread | None = None,
    ):
        assert thread is None or (reduce is None and then is None)
        self.workers, self.message, self.wire, self.residual, self.then = workers, message, wire, residual, then
        self.reduce, self.scratch = reduce, scratch or Scratch(message.device)
        self.shares = shares or equal_shares(message.numel() - 1, workers.size)
        self.waited, self._own, self._tag = 0.0, workers.rank, workers.next_tag()
        self._account()
        self._stages, self._advanced, self._threaded = self._run(weight), False, thread is not None
        self._finite = True
        self._job = thread.begin(self._stages) if thread is not None else None
        if self._job is None:
            next(self._stages)

    def advance(self) -> None:
        """Reduce this worker's share and begin to send the result to all, unless a thread does. All workers call it at the
        same step."""
        if self._job is None and not self._advanced:
            self._advanced = True
            next(self._stages)

    def sent(self) -> None:
        """Wait until this worker's values are encoded, which depends on no other worker."""
        if self._job is not None:
            self._job.wait_for_first()

    def finish(self) -> None:
        """Wait until ``message`` holds the result. Its last element, to divide by, is then 1, or 0 if no worker counts."""
        if self._job is not None:
            self.waited += self._job.wait()
            return
        self.advance()
        for _ in self._stages:
            pass

    def is_finite(self) -> bool:
        """Whether the result is finite, after :meth:`finish`."""
        return self._finite

    def _run(self, weight: float) -> Iterator[None]:
        """The three stages. ``message`` holds the result after the last one."""
        weigh(self.message, weight)
        weights = self.message[-1:].expand(self.workers.size).clone()
        outgoing, incoming = self._outgoing_rows(counts=weight > 0 or weight != weight), self._incoming_rows()
        sends = [(peer, part) for peer, row in enumerate(outgoing) for part in (row, self.message[-1:])]
        receives = [(peer, part) for peer, row in enumerate(incoming) for part in (row, weights[peer : peer + 1])]
        transfer = Transfer(self.workers, sends, receives, self._tag)
        yield
        self._wait(transfer)
        result = self._reduced(outgoing, incoming, weights)
        results = self._results(result)
        peers = [peer for peer in range(self.workers.size) if peer != self._own]
        transfer = Transfer(self.workers, [(peer, result) for peer in peers], list(enumerate(results)), self._tag + 1)
        yield
        self._wait(transfer)
        if self.wire.name != "fp32":
            for peer, row in enumerate(results):
                Row(self.wire, row, self.shares.rows[peer]).decode(self._slice(peer))
            self.scratch.give(*results)
        if bool(weights.isnan().any()):  # the sender refuses to be merged: all see it, even if the wire loses NaN
            self.message.fill_(torch.nan)
        self.message[-1] = ~(weights.sum() <= 0)
        self._finite = finite(self.message)

    def _wait(self, transfer: Transfer) -> None:
        seconds = transfer.wait()
        if not self._threaded:  # otherwise only the thread was blocked
            self.waited += seconds

    def _account(self) -> None:
        """Enter both halves into the ledger."""
        others = self.workers.size - 1
        sizes = [self._size(peer) for peer in range(self.workers.size)]
        payload = sum(sizes) + WEIGHT_BYTES * len(sizes)
        self.workers.ledger.exchange(payload - sizes[self._own] - WEIGHT_BYTES, payload_bytes=payload)
        self.workers.ledger.exchange(others * sizes[self._own])

    def _size(self, peer: int) -> int:
        """Bytes of a worker's share on the wire; float32 shares are not padded."""
        start, stop = self.shares.bounds[peer]
        return 4 * (stop - start) if self.wire.name == "fp32" else self.wire.size_bytes(self.shares.rows[peer])

    def _reduced(self, outgoing: list[Tensor], incoming: list[Tensor], weights: Tensor) -> Tensor:
        """This worker's share of the result, as it is sent to all."""
        own = self._slice(self._own)
        if self.wire.name == "fp32":
            self._reduce_rows(incoming, weights, own)
            self.scratch.give(*(row for peer, row in enumerate(incoming) if peer != self._own))
            return own
        mean = self.scratch.take(self.shares.rows[self._own], torch.float32).zero_()
        self._reduce_encoded([outgoing[p] if p == self._own else row for p, row in enumerate(incoming)], weights, mean)
        self.scratch.give(*{id(row): row for row in (*incoming, *outgoing)}.values())
        result = self.scratch.take(self.wire.size_bytes(len(mean)), torch.uint8)
        Row(self.wire, result, len(mean)).encode(mean, self.residual[1] if self.residual else None)
        self.scratch.give(mean)
        return result

    def _slice(self, peer: int) -> Tensor:
        start, stop = self.shares.bounds[peer]
        return self.message[start:stop]

    def _outgoing_rows(self, counts: bool) -> list[Tensor]:
        """The part of this worker's values that each worker receives."""
        if self.wire.name == "fp32":
            return [self._slice(peer) for peer in range(self.workers.size)]
        rows: list[Tensor] = []
        at = 0
        for peer, numel in enumerate(self.shares.rows):
            row = self.scratch.take(self.wire.size_bytes(numel), torch.uint8)
            kept = self.residual[0][at : at + numel] if self.residual and counts else None
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

    def _reduce_rows(self, rows: list[Tensor], weights: Tensor, out: Tensor) -> None:
        if self.reduce is not None:
            self.reduce(rows, weights, out)
            return
        write_mean(rows, floats(weights), out)
        if self.then is not None:
            self.then(out)

    def _reduce_encoded(self, encoded: list[Tensor], weights: Tensor, out: Tensor) -> None:
        """Reduce rows in the wire's format. A mean decodes one row after the other and never holds all of them as floats."""
        rows = [Row(self.wire, row, len(out)) for row in encoded]
        if self.reduce is None:
            for row, weight in zip(rows, floats(weights), strict=True):
                row.add_to(out, weight)
            out.div_(weights.sum())
            if self.then is not None:
                self.then(out)
            return
        start, stop = self.shares.bounds[self._own]
        decoded = [self.scratch.take(len(out), torch.float32) for _ in rows]
        for row, values in zip(rows, decoded, strict=True):
            row.decode(values)
        self.reduce([values[: stop - start] for values in decoded], weights, out[: stop - start])
        self.scratch.give(*decoded)


class Transfer:
    """Messages to and from the other workers. All of them begin it with matching sizes and the same tag."""

    unfinished: ClassVar[set[Transfer]] = set()
    """Transfers that were begun and not yet waited for. A receive that is forgotten would never be read, and would block all
    that its sender sends later; gloo's group then could not be destroyed before its timeout."""

    def __init__(self, workers: WorkerGroup, sends: list[tuple[int, Tensor]], receives: list[tuple[int, Tensor]], tag: int):
        operations = [
            dist.P2POp(operation, part, group=workers.group, group_peer=peer, tag=tag)
            for operation, parts in ((dist.isend, sends), (dist.irecv, receives))
            for peer, part in parts
            if peer != workers.rank and part.numel()
        ]
        self.tensors = [operation.tensor for operation in operations]
        self.works = dist.batch_isend_irecv(operations) if operations else []
        self.unfinished.add(self)

    def wait(self) -> float:
        """Wait for all messages; the seconds that this took."""
        self.unfinished.discard(self)
        return wait(self.works)


def write_mean(rows: list[Tensor], weights: list[float], out: Tensor) -> None:
    """Write the weighted mean of the rows into ``out``, in pieces that fit a cache; ``out`` may be one of the rows."""
    rule = WeightedMean(weights)
    for here in pieces(out, 0, len(out)):
        out[here] = rule.merge(Block([row[here] for row in rows], None, here.start, 0), None)
