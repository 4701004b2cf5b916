"""The outer optimizer's state: the anchor, which the workers share, and its velocity, in float32."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distmerge.config import mergers
from distmerge.rules.outer import outer_step
from distmerge.theta.flat import FlatParameters
from distmerge.workers.fragments import Bucket
from distmerge.workers.group import WorkerGroup
from distmerge.workers.rule import choice_of
from distmerge.workers.shares import share_numel


class OuterState:
    """Anchor and velocity of a vector, or of this worker's share of it.

    They may be kept in (pinned) host memory while the parameters are on a GPU; each part is then moved when it is used.

    Attributes:
        anchor: ``[n]`` float32.
    """

    def __init__(
        self,
        start: Tensor,
        lr: float,
        momentum: float,
        nesterov: bool,
        device: torch.device | str | None = None,
        written: Callable[[Tensor, slice], Tensor] | None = None,
    ):
        self.written = written or unrounded
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov
        self.device = start.device
        pinned = self.device.type == "cuda" and str(device) == "cpu"
        self.anchor = torch.empty_like(start, device=device, pin_memory=pinned).copy_(start)
        self.velocity = torch.zeros_like(self.anchor, pin_memory=pinned) if momentum else None

    def delta(self, theta: Tensor, part: slice, out: Tensor) -> Tensor:
        """``theta`` minus the part of the anchor as it was written into the model, so after rounding to its dtype."""
        return torch.sub(theta, self.written(self.anchor[part].to(self.device, non_blocking=True), part), out=out)

    def step(self, delta: Tensor, part: slice) -> Tensor:
        """Take the outer step on a part along its merged delta, and return the part's new anchor on the parameters' device."""
        anchor = self.anchor[part].to(self.device, non_blocking=True)
        velocity = None if self.velocity is None else self.velocity[part].to(self.device, non_blocking=True)
        outer_step(anchor, delta, velocity, self.lr, self.momentum, self.nesterov)
        if self.anchor.device != self.device:
            self.anchor[part].copy_(anchor)
            if self.velocity is not None and velocity is not None:
                self.velocity[part].copy_(velocity)
        return anchor

    def add(self, delta: Tensor, part: slice) -> Tensor:
        """Add a part's merged delta to the anchor, which is then the mean. Learning rate and velocity are not used."""
        anchor = self.anchor[part].to(self.device, non_blocking=True)
        outer_step(anchor, delta, None, lr=1.0)
        if self.anchor.device != self.device:
            self.anchor[part].copy_(anchor)
        return anchor

    def state_dict(self) -> dict[str, Any]:
        return {"anchor": self.anchor, "velocity": self.velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.anchor.copy_(state["anchor"])
        if self.velocity is not None:
            self.velocity.copy_(state["velocity"])


def start_outer(
    settings: mergers.DiLoCoSettings, flat: FlatParameters, buckets: Sequence[Bucket], workers: WorkerGroup
) -> OuterState | None:
    """The outer state at the start of a run; None if theta itself is sent and no anchor is needed."""
    # Averaging in float32 sends theta itself. Other wires, rules, overlap and mix need the delta, and so the anchor.
    s = settings
    plain = s.wire == "fp32" and choice_of(s) is None and s.overlap == s.mix == 0 and not s.outer_sharded
    if s.outer_lr == 1 and s.outer_momentum == 0 and plain:
        return None
    assert s.outer_lr is not None and s.outer_momentum is not None, "a merger's settings are complete"
    start = own_shares(flat.vector, buckets, workers) if s.outer_sharded else flat.vector
    return OuterState(start, s.outer_lr, s.outer_momentum, s.nesterov, s.outer_device, written_of(flat, s.outer_sharded))


def written_of(flat: FlatParameters, sharded: bool) -> Callable[[Tensor, slice], Tensor] | None:
    """The function that rounds a part of the anchor as the model does when it takes it; None if it is not rounded."""
    if not sharded or len(set(flat.stored_dtypes)) == 0:
        return flat.written if flat.stored_dtypes else None
    # A share does not follow the slots, so it can be rounded only if the whole model has one dtype.
    return flat.written if len(set(flat.stored_dtypes)) == 1 else None


def unrounded(anchor: Tensor, part: slice) -> Tensor:
    """A part of the anchor as it is, for a model that takes it in float32."""
    return anchor


def share_slices(buckets: Sequence[Bucket], peers: int) -> list[slice]:
    """The places of a worker's shares of the buckets in its sharded anchor."""
    bounds = itertools.accumulate((share_numel(bucket.numel, peers) for bucket in buckets), initial=0)
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def own_shares(vector: Tensor, buckets: Sequence[Bucket], workers: WorkerGroup) -> Tensor:
    """This worker's share of each bucket, end to end: its part of a sharded anchor."""
    shares: list[Tensor] = []
    for bucket in buckets:
        share = share_numel(bucket.numel, workers.size)
        values = vector.new_zeros(workers.size * share)
        for part, place in bucket.parts(values):
            values[place] = vector[part]
        shares.append(values[workers.rank * share : (workers.rank + 1) * share])
    return torch.cat(shares)
