"""How a bucket of deltas is reduced: in one all-reduce, or in an exchange whose owners run the rule or the outer step."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from distmerge.config import mergers
from distmerge.finite import nonfinite
from distmerge.theta.flat import FlatParameters, pieces
from distmerge.workers.background import StageThread
from distmerge.workers.divergence import Divergence
from distmerge.workers.exchange import Exchange
from distmerge.workers.fragments import Bucket
from distmerge.workers.group import WorkerGroup
from distmerge.workers.outer_state import OuterState, share_slices
from distmerge.workers.pending import AllReduce, PendingReduce
from distmerge.workers.rule import Choice, WorkerRule
from distmerge.workers.scratch import Scratch
from distmerge.workers.shares import Shares, equal_shares
from distmerge.workers.wire import WIRES


class DeltaReducer:
    """Begins the reduction of buckets over the workers.

    Args:
        buckets: all buckets of theta.
        outer: holds the anchor that deltas are relative to; None if theta itself is sent.
        choice: the rule that the owners of shares run; None for a weighted mean.

    Attributes:
        residuals: the rounding errors that error feedback keeps, by bucket: of the values that this worker sends, and of the
            results that it sends as an owner.
    """

    def __init__(
        self,
        settings: mergers.DiLoCoSettings,
        flat: FlatParameters,
        workers: WorkerGroup,
        buckets: list[Bucket],
        outer: OuterState | None,
        choice: Choice | None = None,
    ):
        self.settings, self.flat, self.workers, self.outer = settings, flat, workers, outer
        self.rule = None if choice is None else WorkerRule(choice, flat, workers)
        self.wire = WIRES[settings.wire]
        self.sharded = share_slices(buckets, workers.size) if settings.outer_sharded else []
        self.shares = {bucket.index: self._shares_of(bucket) for bucket in buckets}
        new, memory = flat.vector.new_zeros, buckets if settings.error_feedback else []
        rows = {bucket.index: self.shares[bucket.index].rows for bucket in memory}
        self.residuals = {index: (new(sum(row)), new(row[workers.rank])) for index, row in rows.items()}
        self.scratch = Scratch(flat.vector.device)
        # The rules' owners need collectives inside the worker, which training uses at the same time. On a GPU the host goes on
        # without waiting anyway.
        mean = self.rule is None and not settings.outer_sharded
        self.thread = StageThread() if settings.overlap and mean and flat.vector.device.type == "cpu" else None
        self._room = self._rooms = flat.vector.new_empty(0)

    def _shares_of(self, bucket: Bucket) -> Shares:
        return equal_shares(bucket.numel, self.workers.size) if self.rule is None else self.rule.shares(bucket)

    def _room_for(self, bucket: Bucket) -> Tensor:
        """Memory for one message, reused for one bucket after the other, since fresh memory costs as much as a copy."""
        if self._room.numel() <= bucket.numel:
            self._room = self.flat.vector.new_empty(bucket.numel + 1)
        return self._room[: bucket.numel + 1]

    def rooms_for(self, fragment: list[Bucket]) -> list[Tensor]:
        """Memory for the messages of a fragment in flight, reused for one fragment after the other. They begin at multiples of
        64 elements, as fresh memory does."""
        *starts, stop = itertools.accumulate(((bucket.numel + 64) // 64 * 64 for bucket in fragment), initial=0)
        if self._rooms.numel() < stop:
            self._rooms = self.flat.vector.new_empty(stop)
        return [self._rooms[start : start + bucket.numel + 1] for start, bucket in zip(starts, fragment, strict=True)]

    def forget(self, own_only: bool = False) -> None:
        """Clear the residuals; with ``own_only`` those of this worker's values, and not those of the results that it sends."""
        for of_own, of_mean in self.residuals.values():
            of_own.zero_()
            if not own_only:
                of_mean.zero_()

    def restore(self, residuals: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Load the residuals from a saved state."""
        for index, theirs in residuals.items():
            for mine, values in zip(self.residuals[index], theirs, strict=True):
                mine.copy_(values)

    def send(
        self, bucket: Bucket, message: Tensor | None, weight: float, divergence: Divergence, round: int, plain: bool = False
    ) -> PendingReduce:
        """Begin to reduce a bucket's deltas, or the parameters themselves if this worker holds no whole anchor.

        Args:
            message: memory for it, ``[numel + 1]``; None for memory that the next bucket reuses.
            round: the merger's round, which keys random masks.
            plain: send float32 and take the weighted mean, whatever the wire and the rule are, and whoever owns the anchor.
        """
        theta, sharded = self.flat.vector, self.settings.outer_sharded
        message = self._room_for(bucket) if message is None else message
        if weight > 0:
            for part, place in bucket.parts(theta):
                if self.outer is None or sharded:
                    message[place].copy_(theta[part])
                    continue
                delta = self.outer.delta(theta[part], part, out=message[place])
                if self.rule is None or plain:  # otherwise the owners measure it on the rows they receive
                    divergence.add_own(delta)
        if plain:
            return AllReduce(self.workers, message, weight)
        shares, residual = self.shares[bucket.index], self.residuals.get(bucket.index)
        if self.rule is not None:
            weight = self.rule.prepare(bucket, message, weight, round)
            reduce = self.rule.at_owner(bucket, divergence, round)
            return Exchange(
                self.workers, message, weight, self.wire, residual, reduce=reduce, shares=shares, scratch=self.scratch
            )
        if sharded:
            then = self._owner(bucket, divergence)
            return Exchange(self.workers, message, weight, self.wire, then=then, shares=shares, scratch=self.scratch)
        if self.wire.name == "fp32":
            return AllReduce(self.workers, message, weight, self.thread)
        return Exchange(
            self.workers, message, weight, self.wire, residual, shares=shares, scratch=self.scratch, thread=self.thread
        )

    def _owner(self, bucket: Bucket, divergence: Divergence) -> Callable[[Tensor], None]:
        """The function by which this worker takes a sharded anchor's outer step on the mean of its share of a bucket."""
        whole = self.sharded[bucket.index]

        def step(mean: Tensor) -> None:
            assert self.outer is not None
            if nonfinite(mean):  # all workers will see it and refuse it
                return
            room = mean.new_empty(max((p.stop - p.start for p in pieces(mean, 0, len(mean))), default=0))
            for here in pieces(mean, 0, len(mean)):
                part, values = slice(whole.start + here.start, whole.start + here.stop), mean[here]
                delta = self.outer.delta(values, part, out=room[: len(values)])
                anchor = self.outer.step(delta, part)
                divergence.add_merged_share(torch.sub(values, anchor, out=delta))
                values.copy_(anchor)

        return step
