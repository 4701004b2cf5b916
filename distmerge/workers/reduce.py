"""How a bucket of deltas travels: in one all-reduce, in a wire's format, or to the owners of a sharded anchor."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distmerge.config import mergers
from distmerge.errors import UserError
from distmerge.finite import nonfinite
from distmerge.theta.flat import FlatParameters
from distmerge.workers.divergence import Spread
from distmerge.workers.fragments import Bucket
from distmerge.workers.group import Peers
from distmerge.workers.outer_state import OuterState, share_slices
from distmerge.workers.pending import AllReduce, Exchange, Flight, share_numel
from distmerge.workers.radial import RadialMean
from distmerge.workers.scratch import Rooms
from distmerge.workers.wire import WIRES


class Sender:
    """Begins means over the peers.

    Args:
        buckets: all of theta's.
        outer: the anchor that deltas are taken from; None where theta itself travels.

    Attributes:
        residuals: error feedback's memory, by bucket: of what this worker sends, and of the mean that it sends as an owner.
    """

    def __init__(
        self,
        settings: mergers.DiLoCoSettings,
        flat: FlatParameters,
        peers: Peers,
        buckets: list[Bucket],
        outer: OuterState | None,
    ):
        refuse_what_cannot_travel(settings)
        self.settings, self.flat, self.peers, self.outer = settings, flat, peers, outer
        self.wire = WIRES[settings.wire]
        self.shares = share_slices(buckets, peers.size) if settings.outer_sharded else []
        new, memory = flat.vector.new_zeros, buckets if settings.error_feedback else []
        sizes = {bucket.index: share_numel(bucket.numel, peers.size) for bucket in memory}
        self.residuals = {index: (new(peers.size * size), new(size)) for index, size in sizes.items()}
        self.rooms = Rooms(flat.vector.device)
        self._room = flat.vector.new_empty(0)

    def room_for(self, bucket: Bucket) -> Tensor:
        """Room for one message, used for one bucket after the other and kept: fresh memory costs as much as a copy."""
        if self._room.numel() <= bucket.numel:
            self._room = self.flat.vector.new_empty(bucket.numel + 1)
        return self._room[: bucket.numel + 1]

    def forget(self, own_only: bool = False) -> None:
        """Empty error feedback's memory; with ``own_only``, of what this worker sent, and not of the means that it owns."""
        for of_own, of_mean in self.residuals.values():
            of_own.zero_()
            if not own_only:
                of_mean.zero_()

    def send(self, bucket: Bucket, message: Tensor, weight: float, spread: Spread, plain: bool = False) -> Flight:
        """Begin the mean of a bucket's deltas; of the parameters themselves where no whole anchor is at hand.

        Args:
            plain: send float32 and take the weighted mean, whatever the wire, the rule and the anchor's owner are.
        """
        theta, sharded = self.flat.vector, self.settings.outer_sharded
        if weight > 0:
            for part, place in bucket.parts(theta):
                if self.outer is None or sharded:
                    message[place].copy_(theta[part])
                else:
                    spread.add_own(self.outer.delta(theta[part], part, out=message[place]))
        if plain:
            return AllReduce(self.peers, message, weight)
        if self.settings.rule == "radial":
            return RadialMean(self.peers, self.flat, message, weight)
        if sharded:
            return Exchange(self.peers, message, weight, self.wire, owner=self._owner(bucket, spread), rooms=self.rooms)
        if self.wire.name == "fp32":
            return AllReduce(self.peers, message, weight)
        return Exchange(self.peers, message, weight, self.wire, self.residuals.get(bucket.index), rooms=self.rooms)

    def _owner(self, bucket: Bucket, spread: Spread) -> Callable[[Tensor], None]:
        """What this peer does to the mean of its share of a bucket: the outer step of a sharded anchor."""
        part = self.shares[bucket.index]

        def step(mean: Tensor) -> None:
            assert self.outer is not None
            if nonfinite(mean):  # all peers will see it, and refuse it
                return
            anchor = self.outer.step(self.outer.delta(mean, part, out=torch.empty_like(mean)), part)
            spread.add_merged_share(mean - anchor)
            mean.copy_(anchor)

        return step


def refuse_what_cannot_travel(settings: mergers.DiLoCoSettings) -> None:
    """Refuse rules that have no way between workers, and the radial mean where its whole vector is not one float32 message.

    Raises:
        UserError: naming the key.
    """
    if settings.rule not in ("mean", "radial") or settings.parameters:
        raise UserError(f"rule {settings.rule!r} does not run across workers yet")
    plain: dict[str, tuple[object, object]] = {
        "fragments": (settings.fragments, 1), "overlap": (settings.overlap, 0), "wire": (settings.wire, "fp32"),
    }  # fmt: skip
    for key, (value, wanted) in plain.items() if settings.rule == "radial" else ():
        if value != wanted:
            raise UserError(f'{key} must be {wanted} for rule "radial", got {value}')
