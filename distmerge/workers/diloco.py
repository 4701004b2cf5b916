"""DiLoCo (https://arxiv.org/abs/2311.08105): train H steps alone, then move what is shared along the mean delta.

    repeat:
        each worker:  theta_m <- H inner steps from theta
        delta_m = theta_m - anchor
        d       = mean_m delta_m                      (one collective per bucket)
        anchor  = outer_step(anchor, d, velocity)     (Nesterov)
        theta_m = anchor

With outer rate 1 and no momentum this is parameter averaging (local SGD), and needs no anchor.

    merger = DiLoCo(model, every=50)
    for batch in data:
        ...; optimizer.step(); merger.step()
    merger.finish()
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.buffers import Policy, buffer_policies
from distmerge.errors import UserError
from distmerge.flat import FlatParameters, flatten, pieces
from distmerge.rules.outer import outer_step
from distmerge.workers.total import Peers


@dataclass(frozen=True)
class MergeReport:
    """One merge.

    Attributes:
        round: merges done, this one included.
        steps: inner steps since the merge before.
        divergence: ``mean_m |delta_m - d|^2`` over all parameters, just before the merge.
        correlation: the mean cosine between two workers' deltas (as if of equal norms); None without an anchor.
        bytes_sent: what left this rank for it.
    """

    round: int
    steps: int
    divergence: float
    correlation: float | None
    collectives: int
    bytes_sent: float
    seconds: float


class DiLoCo:
    """Merges the parameters of the workers in a process group every ``every`` inner steps.

    Args:
        model: any module, or parameters already laid out flat.
        every: inner steps between merges (H).
        outer_lr, outer_momentum, nesterov: the outer optimizer.
        group: the peers, one rank of each worker; all ranks by default.
        bucket_bytes: bytes of parameters per collective.
        buffers: policies of buffers that are not known by name, see :mod:`distmerge.buffers`.

    Raises:
        UserError: for a value out of range, a buffer without a policy, or before init_process_group.
    """

    def __init__(
        self,
        model: nn.Module | FlatParameters,
        every: int,
        outer_lr: float = 0.7,
        outer_momentum: float = 0.9,
        nesterov: bool = True,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = 64 * 2**20,
        buffers: dict[str, Policy] | None = None,
    ):
        for name, value, allowed, holds in (
            ("every", every, "an integer", isinstance(every, int)),
            ("every", every, ">= 1", every >= 1),
            ("outer_lr", outer_lr, "> 0", outer_lr > 0),
            ("outer_momentum", outer_momentum, "in [0, 1)", 0 <= outer_momentum < 1),
            ("bucket_bytes", bucket_bytes, ">= 4", bucket_bytes >= 4),
        ):
            if not holds:
                raise UserError(f"{name} must be {allowed}, got {value}")
        self.peers = Peers(group)
        self.flat = flatten(model)
        self.policies = buffer_policies(self.flat.model, buffers)
        self.every, self.lr, self.momentum, self.nesterov = every, outer_lr, outer_momentum, nesterov
        self.bucket = bucket_bytes // 4
        self.round = 0
        self.steps = 0
        self.peers.start_equal(self.flat)
        averages = outer_lr == 1 and outer_momentum == 0
        self.anchor: Tensor | None = None if averages else self.flat.vector.clone()
        self.velocity: Tensor | None = torch.zeros_like(self.flat.vector) if outer_momentum else None

    def step(self) -> MergeReport | None:
        """Count one inner step, and merge if it was the round's last."""
        self.steps += 1
        return self.merge() if self.steps == self.every else None

    def finish(self) -> MergeReport | None:
        """Merge the round that was begun, if any, so that all workers end with the same model."""
        return self.merge(full=True) if self.steps else None

    @torch.no_grad()
    def merge(self, full: bool = False) -> MergeReport:
        """Merge now."""
        began = time.perf_counter()
        collectives, sent = self.peers.ledger.collectives, self.peers.ledger.bytes_sent
        self.flat.pull()
        vector = self.flat.vector
        # |delta_m|^2 of this worker (or |theta_m - mean|^2 without an anchor) and |d|^2
        norms = torch.zeros(2, dtype=torch.float64, device=vector.device)
        buffer = vector.new_empty(min(self.bucket, vector.numel()))
        for start in range(0, vector.numel(), self.bucket):
            stop = min(start + self.bucket, vector.numel())
            bucket = buffer[: stop - start]
            self._take(bucket, start, stop, norms)
            self.peers.total(bucket)
            self._apply(bucket, start, stop, norms)
        self.flat.push()
        self.peers.merge_buffers(self.flat.model, self.policies, full)
        divergence, correlation = self._compare(norms)
        self.round += 1
        report = MergeReport(
            round=self.round,
            steps=self.steps,
            divergence=divergence,
            correlation=correlation,
            collectives=self.peers.ledger.collectives - collectives,
            bytes_sent=self.peers.ledger.bytes_sent - sent,
            seconds=time.perf_counter() - began,
        )
        self.steps = 0
        return report

    def _take(self, bucket: Tensor, start: int, stop: int, norms: Tensor) -> None:
        """bucket = theta - anchor; the parameters themselves where there is no anchor."""
        for part in pieces(bucket, start, stop):
            here = bucket[part.start - start : part.stop - start]
            if self.anchor is None:
                here.copy_(self.flat.vector[part])
            else:
                torch.sub(self.flat.vector[part], self.anchor[part], out=here)
                norms[0] += square(here)

    def _apply(self, bucket: Tensor, start: int, stop: int, norms: Tensor) -> None:
        """Divide the sum, take the outer step, and start the next round from the anchor."""
        for part in pieces(bucket, start, stop):
            mean = bucket[part.start - start : part.stop - start].div_(self.peers.size)
            theta = self.flat.vector[part]
            if self.anchor is None:
                norms[0] += square(theta.sub_(mean))
                theta.copy_(mean)
            else:
                norms[1] += square(mean)
                velocity = None if self.velocity is None else self.velocity[part]
                outer_step(self.anchor[part], mean, velocity, self.lr, self.momentum, self.nesterov)
                theta.copy_(self.anchor[part])

    def _compare(self, norms: Tensor) -> tuple[float, float | None]:
        """Divergence and mean correlation of the workers' deltas, from two scalars."""
        self.flat.sum_over_shards(norms)
        own, merged = norms[:1].clone(), norms[1].item()
        size = self.peers.size
        spread = self.peers.total(own).item() / size
        if self.anchor is None:
            return spread, None
        # |d|^2 = spread / M + (M - 1) / M * correlation * spread
        correlation = (size * merged / spread - 1) / (size - 1) if size > 1 and spread > 0 else None
        return max(0.0, spread - merged), correlation

    @property
    def bytes_sent(self) -> float:
        """Bytes that left this rank for merging since the start, a resumed run's earlier part included."""
        return self.peers.ledger.bytes_sent

    def state_dict(self) -> dict[str, Any]:
        """All that later merges depend on, besides the parameters. The tensors are not copies."""
        return {
            "round": self.round,
            "steps": self.steps,
            "anchor": self.anchor,
            "velocity": self.velocity,
            "ledger": self.peers.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; the parameters are restored by their owner."""
        self.round, self.steps = state["round"], state["steps"]
        for mine, theirs in ((self.anchor, state["anchor"]), (self.velocity, state["velocity"])):
            if mine is not None:
                mine.copy_(theirs)
        self.peers.ledger.load_state_dict(state["ledger"])


def square(x: Tensor) -> Tensor:
    """``|x|^2``, accumulated in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64).square()
