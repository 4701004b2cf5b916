"""SPARTA (https://openreview.net/forum?id=stFPf3gzq1): workers often average a few of their parameters.

    every k steps:
        I        = the same p n indices on all workers
        theta[I] = mean_m theta_m[I]
    at the end: theta = mean_m theta_m

With a delay of d steps the mean is computed while training goes on, and the result is applied as a difference:

        theta[I] += mean_m theta_m(t - d)[I] - theta_own(t - d)[I]

This keeps the d steps in between, which overwriting would undo. An index whose difference is still in flight is left out of a
round: two differences to the same values would overshoot, and more of them would diverge.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.config.mergers import Nonfinite, SPARTASettings, Wire
from distmerge.config.toml import checked
from distmerge.engine.flatten import flatten
from distmerge.finite import nonfinite
from distmerge.theta.buffers import Policy
from distmerge.theta.flat import FlatParameters
from distmerge.workers.diloco import DiLoCo
from distmerge.workers.divergence import MergeReport
from distmerge.workers.exchange import Exchange
from distmerge.workers.health import check_mean
from distmerge.workers.pending import AllReduce, CompletedReduce, PendingReduce, total_weight
from distmerge.workers.saved import check_keys, incompatible
from distmerge.workers.scratch import Scratch
from distmerge.workers.selection import select
from distmerge.workers.wire import WIRES

ROUND_FIELDS = 6
"""Fields that a checkpoint keeps of a round in flight: what ``SPARTA.state_dict`` writes."""


@dataclass
class Round:
    """A round in flight: its number, the step it was sent at, this worker's own values then.

    Indices are kept only if they are used again at once; a delayed round computes them once more. ``taken`` ``[k]`` bool says
    which of the drawn indices the round has; None if it has all. A ``void`` round is completed, since all workers take part in
    its collectives, but not applied, since this worker's parameters have been replaced in the meantime.
    """

    number: int
    sent_at: int
    indices: Tensor | None
    own: Tensor | None
    pending: PendingReduce
    void: bool = False
    taken: Tensor | None = None


class SPARTA:
    """Averages a fraction of the parameters of the workers in a process group every ``every`` steps.

    Args:
        model: any module, or parameters already laid out flat.
        fraction: share of the parameters in a round (p).
        every: inner steps between rounds.
        selector: "random", "shuffled" or "partitioned", see :mod:`distmerge.workers.selection`.
        delay: inner steps that a round is in flight; at most a cycle of the selector, if it has one.
        ema: smoothing of the differences, ``s = ema s + (1 - ema) difference`` for each parameter.
        wire: the format of the values that travel.
        seed: the seed of the indices.
        nonfinite: as for :class:`~distmerge.workers.diloco.DiLoCo`.
        group, buffers: as for :class:`~distmerge.workers.diloco.DiLoCo`.

    Attributes:
        weight: this worker's weight in the next rounds; at 0 it takes part and does not count.
    """

    anchor: Tensor | None = None

    def __init__(
        self,
        model: nn.Module | FlatParameters,
        fraction: float = 0.005,
        every: int = 1,
        selector: Literal["random", "shuffled", "partitioned"] = "partitioned",
        delay: int = 0,
        ema: float = 0.0,
        wire: Wire = "fp32",
        seed: int = 0,
        nonfinite: Nonfinite = "raise",
        group: dist.ProcessGroup | None = None,
        buffers: dict[str, Policy] | None = None,
    ):
        self.settings = checked(
            SPARTASettings, fraction=fraction, every=every, selector=selector, delay=delay, ema=ema, wire=wire,
            nonfinite=nonfinite,
        )  # fmt: skip
        self.every = every
        self.flat = flatten(model)
        # The final model is a full average. It is made by DiLoCo with outer learning rate 1, which is never due before the end.
        self.average = DiLoCo(
            self.flat, every=1 << 62, outer_lr=1.0, outer_momentum=0.0, nonfinite=nonfinite, group=group, buffers=buffers
        )
        self.workers = self.average.workers
        self.wire, self.seed = WIRES[wire], seed
        self.scratch = Scratch(self.flat.vector.device)
        self.weight = 1.0
        self.round = 0
        self.rounds: deque[Round] = deque()
        self.smoothed = torch.zeros_like(self.flat.vector) if ema else None
        self.under_way = torch.zeros_like(self.flat.vector, dtype=torch.bool) if delay else None  # by element

    @property
    def steps(self) -> int:
        """Inner steps so far."""
        return self.average.steps

    @torch.no_grad()
    def step(self, tokens: float | Tensor = 1.0) -> MergeReport | None:
        """Count one inner step; begin a round and apply an earlier one if they are due."""
        self.average.step(tokens)
        began = time.perf_counter()
        report = self._apply_due(began)  # before the next round is sent, which may take the same indices again
        if self.steps % self.settings.every == 0:
            self.flat.pull()
            self._begin()
        for sparse in self.rounds:
            if sparse.sent_at + (self.settings.delay + 1) // 2 == self.steps:
                sparse.pending.advance()
        return report if self.settings.delay else self._apply_due(began)

    def due(self) -> bool:
        """Whether the next step sends something."""
        return (self.steps + 1) % self.settings.every == 0

    def restart(self) -> None:
        """Continue from the present parameters, which are the same on all workers. What is in flight belongs to other
        parameters and is dropped. All workers call it at the same step."""
        for sparse in self.rounds:
            sparse.pending.finish()
        self.rounds.clear()
        if self.under_way is not None:
            self.under_way.zero_()
        if self.smoothed is not None:
            self.smoothed.zero_()

    def start_again(self) -> None:
        """Make differences to this worker's old parameters void, since it alone got new ones; the old may not be finite."""
        for sparse in self.rounds:
            sparse.own, sparse.void = None, True
        if self.smoothed is not None:
            self.smoothed.zero_()

    def finish(self) -> MergeReport | None:
        """Apply what is in flight, then average everything: all workers end with the same bits."""
        with torch.no_grad():
            while self.rounds:
                self._apply(self.rounds.popleft(), time.perf_counter())
        self.flat.push()
        self.average.weight = self.weight
        return self.average.finish()

    def indices(self, number: int) -> Tensor:
        """The indices of a round into this rank's vector; they are the same on all workers."""
        vector, s = self.flat.vector, self.settings
        return select(s.selector, vector.numel(), s.fraction, number, self.seed, vector.device)

    def _begin(self) -> None:
        """Begin a round with one gather and one collective; no worker sends anything if all drawn indices are in flight."""
        indices, taken = self.indices(self.round), None
        if self.under_way is not None:
            taken = ~self.under_way[indices]
            indices = indices[taken]
            self.under_way[indices] = True
        self.round += 1
        if len(indices) == 0:
            return
        message = self.flat.vector.new_empty(len(indices) + 1)
        torch.index_select(self.flat.vector, 0, indices, out=message[:-1])
        weight = self._weight(message[:-1])
        # A worker that does not count takes the mean itself, since its own values may be NaN.
        own = message[:-1].clone() if weight > 0 and (self.settings.delay or self.smoothed is not None) else None
        pending: PendingReduce
        if self.wire.name == "fp32":
            pending = AllReduce(self.workers, message, weight)
        else:
            pending = Exchange(self.workers, message, weight, self.wire, scratch=self.scratch)
        kept = None if self.settings.delay else indices
        self.rounds.append(Round(self.round - 1, self.steps, kept, own, pending, taken=taken))

    def _weight(self, values: Tensor) -> float:
        """This worker's weight in a round of its ``values``."""
        if self.settings.nonfinite == "raise":
            return self.weight
        found = nonfinite(values)
        self.flat.sum_over_shards(found)
        return 0.0 if found.item() else self.weight

    def _apply_due(self, began: float) -> MergeReport | None:
        """Apply the oldest round if it has been in flight for ``delay`` steps."""
        if not self.rounds or self.rounds[0].sent_at + self.settings.delay != self.steps:
            return None
        self.flat.pull()
        report = self._apply(self.rounds.popleft(), began)
        self.flat.push()
        return report

    def _apply(self, sparse: Round, began: float) -> MergeReport:
        """Apply a round with one scatter."""
        sparse.pending.finish()
        message = sparse.pending.message
        weights = total_weight(sparse.pending)
        check_mean(sparse.pending, self.settings.nonfinite, self.steps)
        mean, indices = message[:-1].div_(weights), self._indices_of(sparse)
        if self.under_way is not None:
            self.under_way[indices] = False
        if sparse.own is None and not sparse.void:
            self.flat.vector.index_copy_(0, indices, mean)
        elif sparse.own is not None:
            self.flat.vector.index_add_(0, indices, self._smooth(indices, mean.sub_(sparse.own)))
        collectives, sent = self.workers.ledger.take()
        return MergeReport(
            round=sparse.number + 1,
            steps=self.settings.every,
            divergence=None,
            correlation=None,
            collectives=collectives,
            bytes_sent=sent,
            seconds=time.perf_counter() - began,
            wait_seconds=sparse.pending.waited,
        )

    def _indices_of(self, sparse: Round) -> Tensor:
        drawn = self.indices(sparse.number) if sparse.indices is None else sparse.indices
        return drawn if sparse.taken is None else drawn[sparse.taken]

    def _smooth(self, indices: Tensor, difference: Tensor) -> Tensor:
        if self.smoothed is None:
            return difference
        smoothed = self.smoothed[indices].lerp_(difference, 1 - self.settings.ema)
        self.smoothed.index_copy_(0, indices, smoothed)
        return smoothed

    @property
    def bytes_sent(self) -> float:
        """Bytes that this rank has sent for merging since the start."""
        return self.workers.ledger.bytes_sent

    @property
    def collectives(self) -> int:
        """Collective operations for merging since the start."""
        return self.workers.ledger.collectives

    def state_dict(self) -> dict[str, Any]:
        """All that later rounds depend on. It waits for the rounds in flight, so all workers call it at the same step; they are
        applied when they are due."""
        for sparse in self.rounds:
            sparse.pending.finish()
        return {
            "round": self.round,
            "smoothed": self.smoothed,
            "rounds": [(r.number, r.sent_at, r.own, r.pending.message, r.void, r.taken) for r in self.rounds],
            "average": self.average.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where ``state`` was taken. The caller restores the parameters."""
        check_keys(state, ("round", "smoothed", "rounds", "average"), "the state of a sparta merger")
        if any(len(saved) != ROUND_FIELDS for saved in state["rounds"]):
            raise incompatible("a round in flight", f"there are not {ROUND_FIELDS} fields")
        device = self.flat.vector.device
        self.round = state["round"]
        if self.smoothed is not None:
            self.smoothed.copy_(state["smoothed"])
        self.rounds = deque(
            Round(
                number,
                sent_at,
                None,
                None if own is None else own.to(device),
                CompletedReduce(message.to(device)),
                void,
                None if taken is None else taken.to(device),
            )
            for number, sent_at, own, message, void, taken in state["rounds"]
        )
        if self.under_way is not None:
            self.under_way.zero_()
            for sparse in self.rounds:
                self.under_way[self._indices_of(sparse)] = True
        self.average.load_state_dict(state["average"])
