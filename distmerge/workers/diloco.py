"""DiLoCo (https://arxiv.org/abs/2311.08105): train H steps alone, then move what is shared along the mean delta.

    repeat:
        each worker:  theta_m <- H inner steps
        delta_m = theta_m - anchor
        d       = mean_m delta_m                      (one collective per bucket)
        anchor  = outer_step(anchor, d, velocity)     (Nesterov)
        theta_m = anchor

Streaming DiLoCo (https://arxiv.org/abs/2501.18512) does this for one fragment of theta at a time, staggered over the H
steps; sends at step t, goes on training, and applies what came back at t + overlap:

        theta_m = mix * theta_m + (1 - mix) * anchor

With outer rate 1 and no momentum this is parameter averaging (local SGD), and on a float32 wire it needs no anchor.

    merger = DiLoCo(model, every=50)
    for batch in data:
        ...; optimizer.step(); merger.step()
    merger.finish()
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge import config
from distmerge.buffers import Policy, buffer_policies
from distmerge.config_file import checked
from distmerge.engine.flatten import check_peers, flatten
from distmerge.flat import FlatParameters
from distmerge.rules.mean import token_weight
from distmerge.workers.flight import Flight, InFlight, total_weight
from distmerge.workers.fragments import Bucket, cut_fragments, due_fragment
from distmerge.workers.outer_state import OuterState, own_shares
from distmerge.workers.report import MergeReport, Spread
from distmerge.workers.sender import Sender
from distmerge.workers.total import Peers


class DiLoCo:
    """Merges the parameters of the workers in a process group every ``every`` inner steps.

    Args:
        model: any module, or parameters already laid out flat.
        every: inner steps between merges of a parameter (H).
        outer_lr, outer_momentum, nesterov: the outer optimizer.
        fragments, fragment_order: parts of theta that merge in turn, "strided" over depth or "balanced" by bytes.
        overlap: inner steps between sending and applying (tau), while the collectives run.
        mix: share of a worker's own parameters that it keeps in a merge (alpha).
        wire: the format of the values that travel: "fp32", "bf16", "int8" or "int4".
        error_feedback: add what the wire's rounding lost to the next message.
        rule: "mean", "tokens" (weights tokens^2 / steps) or "radial" (length and direction apart, per tensor).
        outer_sharded: each worker keeps and steps 1/M of anchor and velocity.
        outer_device: "cpu" keeps anchor and velocity in host memory.
        group: the peers, one rank of each worker; all ranks by default.
        bucket_bytes: bytes of parameters per collective.
        buffers: policies of buffers that are not known by name, see :mod:`distmerge.buffers`.

    Attributes:
        weight: this worker's weight in the next merges. At 0 it takes part, does not count, and starts again from what
            the others share.

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
        fragments: int = 1,
        fragment_order: str = "strided",
        overlap: int = 0,
        mix: float = 0.0,
        wire: str = "fp32",
        error_feedback: bool = False,
        rule: str = "mean",
        outer_sharded: bool = False,
        outer_device: str | None = None,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = 64 * 2**20,
        buffers: dict[str, Policy] | None = None,
    ):
        values = {name: value for name, value in locals().items() if name in config.DiLoCo.model_fields}
        self.settings = checked(config.DiLoCo, **values)
        self.peers = Peers(group)
        self.flat = flatten(model)
        check_peers(self.flat, self.peers.group)
        self.policies = buffer_policies(self.flat.model, buffers)
        bucket_numel = self.flat.vector.numel() if rule == "radial" else bucket_bytes // 4
        self.fragments = cut_fragments(self.flat, fragments, fragment_order, bucket_numel)
        self.weight = 1.0
        self.round = 0
        self.steps, self.tokens = 0, 0.0
        # each fragment's steps and tokens when it was last sent
        self.sent: list[tuple[int, float]] = [(0, 0.0)] * fragments
        self.flying: InFlight | None = None
        self.peers.start_equal(self.flat)
        self.outer = self._start_outer()
        self.sender = Sender(self.settings, self.flat, self.peers, self.buckets, self.outer)
        self._reported = (0, 0.0)

    def step(self, tokens: float = 1.0) -> MergeReport | None:
        """Count one inner step, on ``tokens`` tokens, and merge what is due."""
        self.steps += 1
        self.tokens += tokens
        report = self._fly() if self.flying else None
        number = due_fragment(self.steps, self.settings.every, len(self.fragments))
        if number is None:
            return report
        if not self.settings.overlap:
            return self.merge(number, self.settings.mix)
        self._send_off(number)
        return report

    def finish(self) -> MergeReport | None:
        """Apply what is in flight and merge every round that was begun: all workers end with the same bits."""
        report = self._land() if self.flying else None
        differ = self.settings.mix > 0 or self.settings.overlap > 0
        begun = [number for number, (steps, _) in enumerate(self.sent) if differ or steps < self.steps]
        for number in begun:
            report = self.merge(number, full=number == begun[-1])
        return report

    def due(self) -> bool:
        """Whether the next step sends something."""
        return due_fragment(self.steps + 1, self.settings.every, len(self.fragments)) is not None

    def restart(self) -> None:
        """Take the present parameters, the same on all workers, for what is shared. The velocity stays; what is in flight, and
        what the wire's rounding lost, are of other parameters and are dropped. Called by all workers together."""
        for flight in self.flying.flights if self.flying else []:
            flight.finish()
        self.flying = None
        self.sender.forget()
        if self.outer is not None:
            vector = self.flat.vector
            self.outer.anchor.copy_(own_shares(vector, self.buckets, self.peers) if self.settings.outer_sharded else vector)

    def start_again(self) -> None:
        """This worker alone got new parameters: what its earlier messages lost by rounding is not theirs."""
        self.sender.forget(own_only=True)

    @torch.no_grad()
    def merge(self, number: int = 0, mix: float = 0.0, full: bool = False) -> MergeReport:
        """Merge a fragment now, one bucket after the other; ``full`` where it ends a merge of everything."""
        began, waited = time.perf_counter(), 0.0
        self.flat.pull()
        steps, weight = self._begin_round(number)
        spread = Spread(self.flat.vector.device)
        for bucket in self.fragments[number]:
            flight = self.sender.send(bucket, self.sender.room_for(bucket), weight, spread)
            self._receive(bucket, flight, weight, mix, spread)
            waited += flight.waited
        return self._report(number, steps, weight, spread, began, waited, full)

    @torch.no_grad()
    def _send_off(self, number: int) -> None:
        """Send a fragment, and go on training."""
        self.flat.pull()
        steps, weight = self._begin_round(number)
        vector = self.flat.vector
        spread = Spread(vector.device)
        flights = [self.sender.send(b, vector.new_empty(b.numel + 1), weight, spread) for b in self.fragments[number]]
        if not self.settings.outer_sharded:
            spread.begin(self.peers, self.flat, weight)
        self.flying = InFlight(number, flights, spread, weight, steps)

    def _fly(self) -> MergeReport | None:
        """What is due at this step for the fragment in flight, at the same step on all workers."""
        assert self.flying is not None
        flown, overlap = self.steps - self.sent[self.flying.fragment][0], self.settings.overlap
        if flown == (overlap + 1) // 2:
            for flight in self.flying.flights:
                flight.advance()
        return self._land() if flown == overlap else None

    @torch.no_grad()
    def _land(self) -> MergeReport:
        """Apply the fragment that is in flight."""
        assert self.flying is not None
        began, flying, self.flying = time.perf_counter(), self.flying, None
        self.flat.pull()
        for bucket, flight in zip(self.fragments[flying.fragment], flying.flights, strict=True):
            self._receive(bucket, flight, flying.weight, self.settings.mix, flying.spread)
        waited = sum(flight.waited for flight in flying.flights)
        return self._report(flying.fragment, flying.steps, flying.weight, flying.spread, began, waited)

    def _receive(self, bucket: Bucket, flight: Flight, weight: float, mix: float, spread: Spread) -> None:
        """Take the outer step along the mean, and start the next round from the anchor."""
        flight.finish()
        weights = total_weight(flight)
        for part, place in bucket.parts(self.flat.vector):
            theta, mean = self.flat.vector[part], flight.message[place].div_(weights)
            if self.outer is None or self.settings.outer_sharded:
                anchor = mean
                if weight > 0:
                    spread.add_own(theta - anchor)
            else:
                spread.add_merged(mean)
                anchor = self.outer.step(mean, part)
            theta.copy_(anchor) if mix == 0 else theta.lerp_(anchor, 1 - mix)

    def _begin_round(self, number: int) -> tuple[int, float]:
        """Inner steps since this fragment was last sent, and this worker's weight."""
        steps, tokens = self.steps - self.sent[number][0], self.tokens - self.sent[number][1]
        self.sent[number] = (self.steps, self.tokens)
        return steps, self.weight * (token_weight(tokens, steps) if self.settings.rule == "tokens" else 1.0)

    def _report(
        self, number: int, steps: int, weight: float, spread: Spread, began: float, waited: float, full: bool = False
    ) -> MergeReport:
        self.flat.push()
        if full or number == len(self.fragments) - 1:
            self.peers.merge_buffers(self.flat, self.policies, full, counts=weight > 0)
        divergence, correlation = spread.finish(self.peers, self.flat, weight, anchored=self.anchor is not None)
        self.round += 1
        ledger = self.peers.ledger
        collectives, sent = self._reported
        self._reported = (ledger.collectives, ledger.bytes_sent)
        return MergeReport(
            round=self.round,
            steps=steps,
            divergence=divergence,
            correlation=correlation,
            collectives=ledger.collectives - collectives,
            bytes_sent=ledger.bytes_sent - sent,
            seconds=time.perf_counter() - began,
            wait_seconds=waited,
        )

    def _start_outer(self) -> OuterState | None:
        s = self.settings
        # Averaging in float32 sends theta itself. Formats, overlap and mix need the delta, and so the anchor.
        plain = s.wire == "fp32" and s.rule != "radial" and s.overlap == s.mix == 0 and not s.outer_sharded
        if s.outer_lr == 1 and s.outer_momentum == 0 and plain:
            return None
        start = own_shares(self.flat.vector, self.buckets, self.peers) if s.outer_sharded else self.flat.vector
        return OuterState(start, s.outer_lr, s.outer_momentum, s.nesterov, s.outer_device)

    @property
    def buckets(self) -> list[Bucket]:
        return [bucket for fragment in self.fragments for bucket in fragment]

    @property
    def anchor(self) -> Tensor | None:
        """What the workers share, in the layout of the flat vector; None where it is theta itself, or sharded."""
        return None if self.outer is None or self.settings.outer_sharded else self.outer.anchor

    @property
    def bytes_sent(self) -> float:
        """Bytes that left this rank for merging since the start, a resumed run's earlier part included."""
        return self.peers.ledger.bytes_sent

    def state_dict(self) -> dict[str, Any]:
        """All that later merges depend on, besides the parameters. The tensors are not copies.

        A fragment in flight is drained, by all workers together, and applied at its step.
        """
        return {
            "round": self.round,
            "steps": self.steps,
            "tokens": self.tokens,
            "sent": self.sent,
            "outer": None if self.outer is None else self.outer.state_dict(),
            "residuals": self.sender.residuals,
            "flying": None if self.flying is None else self.flying.state_dict(),
            "ledger": self.peers.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; the parameters are restored by their owner."""
        self.round, self.steps, self.tokens = state["round"], state["steps"], state["tokens"]
        self.sent = [(steps, tokens) for steps, tokens in state["sent"]]
        if self.outer is not None:
            self.outer.load_state_dict(state["outer"])
        for index, theirs in state["residuals"].items():
            for mine, values in zip(self.sender.residuals[index], theirs, strict=True):
                mine.copy_(values)
        self.flying = None if state["flying"] is None else InFlight.from_state(state["flying"], self.flat.vector.device)
        self.peers.ledger.load_state_dict(state["ledger"])
        self._reported = (self.peers.ledger.collectives, self.peers.ledger.bytes_sent)
