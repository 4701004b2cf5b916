"""The radial-directional mean as a flight: the one rule that needs whole tensors, and so all of theta in one message."""

from __future__ import annotations

import torch
from torch import Tensor

from distmerge.rules.radial import radial_mean
from distmerge.theta.flat import FlatParameters
from distmerge.theta.layers import has_rows_of_their_own
from distmerge.workers.fragments import segments
from distmerge.workers.group import Peers
from distmerge.workers.pending import weigh


class RadialMean:
    """A :class:`~distmerge.workers.pending.Flight` of the deltas of all of theta.

    It is no single sum: what comes after the first depends on it, so all of it happens in ``finish``.
    """

    def __init__(self, peers: Peers, flat: FlatParameters, message: Tensor, weight: float):
        self.peers, self.flat, self.message, self.weight = peers, flat, message, weight
        self.waited = 0.0
        weigh(message, weight)

    def advance(self) -> None:
        pass

    def finish(self) -> None:
        start, numel = self.flat.start, self.message.numel() - 1
        here = [list(segments([slot], start, numel)) for slot in self.flat.layout]
        tensors = [runs[0] if runs else slice(0, 0) for runs in here]
        plain = [has_rows_of_their_own(slot.name) for slot in self.flat.layout]
        weights = torch.full((1, 1), self.weight, device=self.message.device)
        deltas = self.message[None, :-1]
        self.message[:-1] = radial_mean(deltas, weights, self._total, tensors, plain, self.flat.sum_over_shards)
        self.message[-1] = 1.0  # the mean itself

    def _total(self, x: Tensor) -> Tensor:
        return self.peers.total(x.sum(0))
