"""DiLoCo (https://arxiv.org/abs/2311.08105): workers train H steps alone, then move a shared anchor along their mean delta.

    repeat:
        each worker:  theta_m <- H inner steps
        delta_m = theta_m - anchor
        d       = mean_m delta_m                      (one collective per bucket)
        anchor  = outer_step(anchor, d, velocity)     (Nesterov)
        theta_m = anchor

Streaming DiLoCo (https://arxiv.org/abs/2501.18512) does this for one fragment of theta at a time, staggered over the H
steps. It sends a fragment at step t, goes on training, and applies the result at step t + overlap:

        theta_m = mix * theta_m + (1 - mix) * anchor

With outer learning rate 1 and no momentum this is parameter averaging (local SGD), which needs no anchor on a float32 wire.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.config.mergers import DiLoCoSettings, Nonfinite, Wire
from distmerge.config.toml import checked
from distmerge.engine.flatten import check_group, flatten
from distmerge.rules.mean import token_weight
from distmerge.theta.buffers import Policy, buffer_policies
from distmerge.theta.flat import FlatParameters
from distmerge.workers.divergence import Divergence, MergeReport
from distmerge.workers.fragments import Bucket, cut_fragments, due_fragment
from distmerge.workers.group import WorkerGroup
from distmerge.workers.health import check_mean, is_finite
from distmerge.workers.outer_state import own_shares, start_outer
from distmerge.workers.pending import PendingFragment, PendingReduce, total_weight
from distmerge.workers.progress import Progress
from distmerge.workers.reduce import DeltaReducer
from distmerge.workers.rule import choice_of
from distmerge.workers.saved import check_keys


class DiLoCo:
    """Merges the parameters of the workers in a process group every ``every`` inner steps.

    Args:
        model: any module, or parameters that are already laid out flat.
        every: inner steps between merges of a parameter (H).
        outer_lr, outer_momentum, nesterov: the outer optimizer, by default 0.7 (1.0 with 4 workers or more), 0.5 and True.
        fragments, fragment_order, fragment_patterns: parts that merge in turn: "strided", "balanced", or a regex of names each.
        overlap: inner steps between sending a fragment and applying its result (tau), while the collectives run.
        mix: the share of its own parameters that a worker keeps in a merge (alpha).
        wire: the format of the values that travel: "fp32", "bf16", "int8" or "int4".
        error_feedback: whether what the wire's rounding lost is added to the next message.
        rule: how the deltas are merged: by any rule of the catalogue, such as "mean", "radial" or "ties", or by "auto".
        weights: "equal", or "tokens": tokens^2 / steps since the last merge. ``rule="tokens"`` is the mean with these.
        auto_rule, auto_above: "auto" takes this rule unless the deltas' mean correlation is above this threshold.
        outer_sharded: whether each worker keeps and steps only 1/M of the anchor and the velocity.
        outer_device: "cpu" keeps the anchor and the velocity in host memory.
        group: one rank of each worker; all ranks by default.
        bucket_bytes: bytes of parameters per collective.
        nonfinite: what to do with NaN and infinity: "raise" on all workers, or "leave-out" (weight 0) whoever has them.
        buffers: policies of buffers that are not known by name, see :mod:`distmerge.theta.buffers`.
        parameters: the rule's own parameters, such as ``density``.

    Attributes:
        weight: this worker's weight in the next merges. At 0 it joins the collectives without counting, and takes the result.

    Raises:
        UserError: for a wrong setting or buffer, or no process group; at a merge, for replaced parameters or a mean not finite.
    """

    def __init__(
        self,
        model: nn.Module | FlatParameters,
        every: int,
        outer_lr: float | None = None,
        outer_momentum: float | None = None,
        nesterov: bool = True,
        fragments: int = 1,
        fragment_order: Literal["strided", "balanced"] = "strided",
        fragment_patterns: tuple[str, ...] = (),
        overlap: int = 0,
        mix: float = 0.0,
        wire: Wire = "fp32",
        error_feedback: bool = False,
        rule: str = "mean",
        weights: Literal["equal", "tokens"] = "equal",
        auto_rule: str = "ties",
        auto_above: float = 0.9,
        outer_sharded: bool = False,
        outer_device: Literal["cpu"] | None = None,
        group: dist.ProcessGroup | None = None,
        bucket_bytes: int = 64 * 2**20,
        nonfinite: Nonfinite = "raise",
        buffers: dict[str, Policy] | None = None,
        **parameters: float | bool | str,
    ):
        settings = checked(
            DiLoCoSettings, every=every, outer_lr=outer_lr, outer_momentum=outer_momentum, nesterov=nesterov,
            fragments=fragments, fragment_order=fragment_order, fragment_patterns=fragment_patterns, overlap=overlap, mix=mix,
            wire=wire, error_feedback=error_feedback, rule=rule, weights=weights, auto_rule=auto_rule, auto_above=auto_above,
            outer_sharded=outer_sharded, outer_device=outer_device, bucket_bytes=bucket_bytes, nonfinite=nonfinite,
            **parameters,
        )  # fmt: skip
        self.workers = WorkerGroup(group)
        self.settings = settings.completed(self.workers.size)
        self.every = every
        self.flat = flatten(model)
        check_group(self.flat, self.workers.group)
        self.policies = buffer_policies(self.flat.model, buffers)
        choice = choice_of(self.settings)
        bucket_numel = bucket_bytes // 4 if choice is None else max(1, self.flat.vector.numel())  # a rule wants whole tensors
        self.fragments = cut_fragments(self.flat, fragments, fragment_order, bucket_numel, fragment_patterns)
        self.buckets = [bucket for fragment in self.fragments for bucket in fragment]
        self.weight = 1.0
        self.round = 0
        self.progress = Progress(fragments)
        self.pending_fragment: PendingFragment | None = None
        self.workers.start_equal(self.flat)
        self.outer = start_outer(self.settings, self.flat, self.buckets, self.workers)
        self.reducer = DeltaReducer(self.settings, self.flat, self.workers, self.buckets, self.outer, choice)

    def step(self, tokens: float | Tensor = 1.0) -> MergeReport | None:
        """Count one inner step on ``tokens`` tokens, and merge what is due."""
        self.progress.count(tokens)
        report = self._advance_pending() if self.pending_fragment else None
        number = due_fragment(self.steps, self.every, len(self.fragments))
        if number is not None and not self.settings.overlap:
            return self.merge(number, self.settings.mix)
        if number is not None:
            self._send_fragment(number)
        return report

    def finish(self) -> MergeReport | None:
        """End with the mean of the workers, with the same bits on all; None if they were equal already.

        The papers' outer step is meant for a whole round. After part of one it would move the anchor along its momentum, away
        from what was trained (``benchmarks/tails.py``). The last merge is therefore the plain mean, in float32 on any wire. A
        fragment in flight is contained in it and dropped."""
        self._drop_pending()
        if self.progress.equal_at == self.steps:
            return None
        *_, report = [self.merge(number, closing=True) for number in range(len(self.fragments))]
        if self.settings.outer_sharded:
            self.restart()
        return report

    def due(self) -> bool:
        """Whether the next step sends something."""
        return due_fragment(self.steps + 1, self.every, len(self.fragments)) is not None

    def restart(self) -> None:
        """Make the present parameters, which are the same on all workers, the anchor. The velocity is kept. Fragments in
        flight and error feedback belong to other parameters and are dropped. All workers must call it at the same step."""
        self._drop_pending()
        self.reducer.forget()
        if self.outer is not None:
            vector = self.flat.vector
            self.outer.anchor.copy_(own_shares(vector, self.buckets, self.workers) if self.settings.outer_sharded else vector)

    def _drop_pending(self) -> None:
        """Forget the fragment in flight, when nothing uses its memory any more. All workers call it at the same step."""
        if self.pending_fragment is not None:
            self.pending_fragment.wait()
            self.pending_fragment = None

    def start_again(self) -> None:
        """Forget the rounding errors of earlier messages, since this worker alone got new parameters."""
        if self.pending_fragment is not None:
            self.pending_fragment.sent()
        self.reducer.forget(own_only=True)

    @torch.no_grad()
    def merge(self, number: int = 0, mix: float = 0.0, closing: bool = False) -> MergeReport:
        """Merge a fragment now, one bucket after the other; with ``closing`` by the plain mean and without an outer step."""
        began = time.perf_counter()
        self.flat.pull()
        steps, weight = self._begin_round(number)
        merged = PendingFragment(number, [], Divergence(self.flat.vector.device), weight, steps)
        for bucket in self.fragments[number]:
            pending = self.reducer.send(bucket, None, weight, merged.divergence, self.round, plain=closing)
            self._receive(bucket, pending, merged, mix, closing)
            merged.pending.append(pending)
        return self._report(merged, began, mix, closing)

    @torch.no_grad()
    def _send_fragment(self, number: int) -> None:
        """Begin the merge of a fragment; training goes on meanwhile."""
        self.flat.pull()
        steps, weight = self._begin_round(number)
        divergence, fragment = Divergence(self.flat.vector.device), self.fragments[number]
        rooms = zip(fragment, self.reducer.rooms_for(fragment), strict=True)
        pending = [self.reducer.send(bucket, room, weight, divergence, self.round) for bucket, room in rooms]
        if not self.settings.outer_sharded and self.reducer.rule is None:
            divergence.begin(self.workers, self.flat, weight)
        self.pending_fragment = PendingFragment(number, pending, divergence, weight, steps)

    def _advance_pending(self) -> MergeReport | None:
        """Do what is due at this step for the fragment in flight; it is due at the same step on all workers."""
        assert self.pending_fragment is not None
        steps_since, overlap = self.progress.since_sent(self.pending_fragment.fragment), self.settings.overlap
        if steps_since == (overlap + 1) // 2:
            self.pending_fragment.advance()
        return self._apply_pending() if steps_since == overlap else None

    @torch.no_grad()
    def _apply_pending(self) -> MergeReport:
        """Apply the fragment that is in flight."""
        assert self.pending_fragment is not None
        began, sent, self.pending_fragment = time.perf_counter(), self.pending_fragment, None
        self.flat.pull()
        for bucket, pending in zip(self.fragments[sent.fragment], sent.pending, strict=True):
            self._receive(bucket, pending, sent, self.settings.mix, False)
        return self._report(sent, began, self.settings.mix)

    def _receive(self, bucket: Bucket, pending: PendingReduce, merged: PendingFragment, mix: float, closing: bool) -> None:
        """Take the outer step along the mean and start from the new anchor; with ``closing`` start from the mean."""
        pending.finish()
        weights = total_weight(pending)
        check_mean(pending, self.settings.nonfinite, self.steps)
        for part, place in bucket.parts(self.flat.vector):
            theta, mean = self.flat.vector[part], pending.message[place].div_(weights)
            if self.outer is None or self.settings.outer_sharded:
                anchor = mean
                if merged.weight > 0:
                    merged.divergence.add_own(theta - anchor)
            else:
                if self.reducer.rule is None or closing:
                    merged.divergence.add_merged(mean)
                anchor = self.outer.add(mean, part) if closing else self.outer.step(mean, part)
            theta.copy_(anchor) if mix == 0 or merged.weight == 0 else theta.lerp_(anchor, 1 - mix)

    def _begin_round(self, number: int) -> tuple[int, float]:
        """Inner steps since this fragment was last sent, and this worker's weight."""
        steps, tokens = self.progress.send(number)
        by_tokens = self.settings.weights == "tokens" and steps > 0  # a fragment may be closed right after it was sent
        healthy = self.settings.nonfinite == "raise" or is_finite(self.flat, self.fragments[number])
        return steps, healthy * self.weight * (token_weight(tokens, steps) if by_tokens else 1.0)

    def _report(self, merged: PendingFragment, began: float, mix: float, closing: bool = False) -> MergeReport:
        self.flat.push()
        last, weight = merged.fragment == len(self.fragments) - 1, merged.weight
        if last:
            self.workers.merge_buffers(self.flat, self.policies, full=closing, counts=weight > 0)
        self.progress.note_merge(mix, closing, last)
        divergence, correlation = merged.divergence.finish(self.workers, self.flat, weight, self.anchor is not None)
        self.round += 1
        collectives, sent = self.workers.ledger.take()
        return MergeReport(
            round=self.round, steps=merged.steps, divergence=divergence, correlation=correlation, collectives=collectives,
            bytes_sent=sent, seconds=time.perf_counter() - began,
            wait_seconds=sum(pending.waited for pending in merged.pending), left_out=weight == 0 and self.weight > 0,
            rule=merged.divergence.rule, because=merged.divergence.because,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Inner steps so far."""
        return self.progress.steps

    @property
    def anchor(self) -> Tensor | None:
        """The shared parameters in the layout of the flat vector; None if there are none, or if they are sharded."""
        return None if self.outer is None or self.settings.outer_sharded else self.outer.anchor

    @property
    def bytes_sent(self) -> float:
        """Bytes that this rank has sent for merging since the start, including the part of the run before a resume."""
        return self.workers.ledger.bytes_sent

    @property
    def collectives(self) -> int:
        """Collective operations for merging since the start, including the part of the run before a resume."""
        return self.workers.ledger.collectives

    def state_dict(self) -> dict[str, Any]:
        """What later merges depend on, without copies. It waits for what is in flight: all workers call it at the same step."""
        return {
            "round": self.round,
            "progress": self.progress.state_dict(),
            "outer": None if self.outer is None else self.outer.state_dict(),
            "residuals": self.reducer.residuals,
            "flying": None if self.pending_fragment is None else self.pending_fragment.state_dict(),
            "ledger": self.workers.ledger.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where ``state`` was taken; the caller restores the parameters. A state without all keys is refused."""
        check_keys(state, ("round", "progress", "outer", "residuals", "flying", "ledger"), "the state of a diloco merger")
        self._drop_pending()
        self.round = state["round"]
        self.progress.load_state_dict(state["progress"])
        if self.outer is not None:
            self.outer.load_state_dict(state["outer"])
        self.reducer.restore(state["residuals"])
        self.pending_fragment = PendingFragment.from_state(state["flying"], self.flat.vector.device)
        self.workers.ledger.load_state_dict(state["ledger"])
