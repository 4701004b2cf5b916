"""Recovery: what a run does about a spike.

While steps are only suspected, blocks and checkpoints are held back; they are released once the run is healthy again. If the
whole run diverges, it goes back to an earlier checkpoint (:mod:`distmerge.recovery.rollback`). If a minority of the workers is
unhealthy, these merge with weight 0 and are then reset to what the healthy ones share.

Every worker judges each of its own steps; its ranks come to the same verdict. The workers exchange their verdicts only at steps
at which they synchronize anyway: when a merge, a checkpoint or an evaluation is due, and at the last step, each time before
anything is merged. Decisions that concern several workers are made at these steps, from the same statuses on all ranks, so that
all ranks decide alike. Every decision is a line of events.jsonl.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.config import train as config
from distmerge.engine.engine import StepResult
from distmerge.errors import UserError
from distmerge.finite import finite
from distmerge.recovery import optimizer_state
from distmerge.recovery.detector import Detector, Verdict
from distmerge.recovery.plan import batch_index
from distmerge.recovery.rollback import Recoverable, RollBack, Unhealthy
from distmerge.windows.window import Window


class WorkerStatus(NamedTuple):
    """What a worker tells the others.

    Attributes:
        unhealthy: why the worker cannot go on as it is; None if it can.
        suspicious: whether its last steps must not be trusted yet.
        notes: ``(step, event, reason)`` of each decision that it made since the last exchange.
    """

    unhealthy: Unhealthy | None
    suspicious: bool
    notes: list[tuple[int, str, str]]


class Recovery:
    """Detects spikes and decides what to do about them.

    Its state is part of the checkpoints, but a roll-back does not restore it, so that earlier attempts are remembered.

    Attributes:
        suspicious: whether this worker's last steps must not be trusted yet.
        held: whether blocks and checkpoints are held back, as of the last exchange.
        owed: whether a checkpoint was due while they were held back.
    """

    def __init__(self, section: config.RecoverySettings, run: Recoverable):
        self.section, self.run, self.mesh = section, run, run.mesh
        self.detector = Detector(section.window, section.threshold)
        self.back = RollBack(section, run)
        self.unhealthy: Unhealthy | None = None  # why this worker is unhealthy, until it is reset
        self.divergence: Unhealthy | None = None  # why the whole run has to go back
        self.suspicious = self.held = self.owed = False
        self.exchanged_at = -1  # the step of the last exchange
        self.notes: list[tuple[int, str, str]] = []

    def lr_factor(self, step: int) -> float:
        """The factor on the learning rate of inner step ``step``, counted from 0."""
        return self.section.lr_factor if step < self.back.cool_until else 1.0

    def batches_of(self, step: int) -> range:
        """Indices of the batches that inner step ``step``, counted from 0, consumes; all but the last are skipped."""
        before = batch_index(step - 1, self.back.skipped) if step else -1
        return range(before + 1, batch_index(step, self.back.skipped) + 1)

    def needed(self, step: int, result: StepResult) -> bool:
        """Whether the whole run has to go back after inner step ``step``, counted from 1. A collective at steps of an exchange.

        If most workers are unhealthy, that is a spike of the whole run; a minority only merges with weight 0.
        """
        if not self.section.enabled:
            return False
        self._note_verdict(step, *self._verdict(result))
        window = self._window_of_local_states()
        if window is not None and self.unhealthy is not None and not self.unhealthy.finite:
            window.taint()
        return self._exchange_due(step) and self._majority_unhealthy(step)

    def _verdict(self, result: StepResult) -> tuple[Verdict, bool]:
        """The detector's verdict, and whether loss, gradient norm and the parameters after the step are finite.

        The loss was computed before the update. An update that is not finite shows only in theta, and must be noticed before
        theta is merged or saved.
        """
        flat = self.run.engine.parameters
        flat.pull()
        total = flat.vector.sum()
        if self.mesh.shards > 1:  # loss and norm are those of the whole worker, but theta is only this rank's part
            dist.all_reduce(total, group=self.mesh.inside)
        loss, norm, total = torch.stack([result.loss, result.grad_norm, total]).tolist()
        verdict = self.detector.check(loss, norm)
        if math.isfinite(loss) and math.isfinite(norm) and not math.isfinite(total) and not self._theta_finite():
            verdict = Verdict("diverged", "the update left parameters that are not finite", verdict.since)
            return verdict, False
        return verdict, math.isfinite(loss) and math.isfinite(norm)

    def _theta_finite(self) -> bool:
        """Whether all elements of theta are finite, on all ranks of the worker. The sum alone may overflow."""
        healthy = torch.tensor([float(finite(self.run.engine.parameters.vector))])
        if self.mesh.shards > 1:
            dist.all_reduce(healthy, dist.ReduceOp.MIN, group=self.mesh.inside)
        return bool(healthy.item())

    def _note_verdict(self, step: int, verdict: Verdict, healthy: bool) -> None:
        """Update this worker's status from the verdict on its step."""
        if verdict.state == "suspected" and not self.suspicious:
            self.notes.append((step, "suspected", verdict.reason))
        if verdict.accepted:
            self.notes.append((step, "level accepted", verdict.reason))
        self.suspicious = verdict.state != "healthy"
        if verdict.state == "diverged":
            since = step - verdict.since - self.section.margin
            if self.unhealthy is None or not healthy:
                self.unhealthy = Unhealthy(
                    min(since, self.unhealthy.since) if self.unhealthy else since, verdict.reason, healthy
                )

    def _exchange_due(self, step: int) -> bool:
        """Whether the workers exchange their statuses at this step. A single worker always has all that it needs."""
        config = self.run.config
        due = step == config.steps or any(step % every == 0 for every in (config.checkpoint.every, config.evaluate.every))
        return due or self.mesh.workers == 1 or any(merger.due() for merger in self.run.mergers)

    def _majority_unhealthy(self, step: int) -> bool:
        """Exchange statuses; whether most workers are unhealthy. A minority only gets weight 0, and its blocks are tainted."""
        self.exchanged_at = step
        statuses = self._gather_statuses()
        for at, event, reason in (note for status in statuses for note in status.notes):
            self.run.tell(at, event, {"reason": reason})
        unhealthy = {worker: status.unhealthy for worker, status in enumerate(statuses) if status.unhealthy is not None}
        self.held = any(status.suspicious for status in statuses if status.unhealthy is None)
        if 2 * len(unhealthy) > self.mesh.workers:
            several = self.mesh.workers > 1
            reasons = [f"worker {worker}: {cause.reason}" if several else cause.reason for worker, cause in unhealthy.items()]
            all_finite = all(cause.finite for cause in unhealthy.values())
            self.divergence = Unhealthy(min(cause.since for cause in unhealthy.values()), "; ".join(reasons), all_finite)
            return True
        if unhealthy:
            self._leave_out(step, unhealthy)
        elif not self.held and self.run.window is not None and (released := self.run.window.release()):
            self.run.tell(step, "blocks released", {"blocks": released})
        return False

    def _gather_statuses(self) -> list[WorkerStatus]:
        status, self.notes = WorkerStatus(self.unhealthy, self.suspicious, self.notes), []
        if self.mesh.workers == 1:
            return [status]
        gathered: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(gathered, status)
        return gathered[:: self.mesh.shards]

    def _leave_out(self, step: int, unhealthy: dict[int, Unhealthy]) -> None:
        """Give unhealthy workers weight 0 in this step's merges. :meth:`reset` resets them after these."""
        reasons = "; ".join(f"worker {worker}: {cause.reason}" for worker, cause in unhealthy.items())
        facts = {"workers": sorted(unhealthy), "reason": reasons, "action": "merges with weight 0, then is reset"}
        self.run.tell(step, "sick worker", facts)
        window = self.run.window
        if window is not None:
            anchored = self._window_of_local_states() is None
            if not anchored or any(cause.finite for cause in unhealthy.values()):
                window.taint()  # also if its blocks average anchors: earlier merges may have taken in diverging parameters
            if marked := window.taint_published(min(cause.since for cause in unhealthy.values()), held_only=anchored):
                self.run.tell(step, "blocks tainted", {"blocks": marked})
        for merger in self.run.mergers:
            merger.weight = float(self.unhealthy is None)
        if self._anchor() is None:
            self._take_healthy_mean()

    def _window_of_local_states(self) -> Window | None:
        """The window, unless its blocks average anchors: those hold only what healthy workers have merged."""
        window = self.run.window
        return window if window is not None and window.anchored is None else None

    def _anchor(self) -> Tensor | None:
        return next((merger.anchor for merger in self.run.mergers if merger.anchor is not None), None)

    @torch.no_grad()
    def _take_healthy_mean(self) -> None:
        """Reset theta and the buffers of unhealthy workers to the mean of the healthy ones, which is all that the workers share
        if no merger keeps an anchor. A collective."""
        flat = self.run.engine.parameters
        flat.pull()
        buffers = [buffer for buffer in flat.model.buffers() if buffer.is_floating_point()]
        message = torch.cat([flat.vector, *(buffer.float().view(-1) for buffer in buffers), flat.vector.new_ones(1)])
        if self.unhealthy is not None:
            message.zero_()
        dist.all_reduce(message, group=self.mesh.peers)
        if self.unhealthy is not None:
            message /= message[-1].clone()
            theta, *means, _ = message.split([flat.vector.numel(), *(buffer.numel() for buffer in buffers), 1])
            flat.vector.copy_(theta)
            flat.push()
            for buffer, mean in zip(buffers, means, strict=True):
                buffer.copy_(mean.view(buffer.shape))

    @torch.no_grad()
    def reset(self, step: int) -> None:
        """If this worker is unhealthy, reset it to the anchor, after the merges of a step with an exchange. Its optimizer
        moments are cleared unless they are finite and ``keep_optimizer`` is "keep"."""
        if self.unhealthy is None or self.exchanged_at != step:
            return
        anchor, flat = self._anchor(), self.run.engine.parameters
        if anchor is not None:
            flat.vector.copy_(anchor)
            flat.push()
        if self.section.keep_optimizer != "keep" or not optimizer_state.all_finite(
            optimizer_state.take(self.run.engine.optimizers)
        ):
            optimizer_state.reset(self.run.engine.optimizers)
        for merger in self.run.mergers:
            merger.start_again()
        last = step == self.run.config.steps  # it then has a copy of the others' work, which must not count twice at the end
        self._mark_healthy(self.section.cool_down, weight=0.0 if last else 1.0)

    def _mark_healthy(self, quiet: int, weight: float = 1.0) -> None:
        self.unhealthy = self.divergence = None
        self.suspicious = False
        self.detector.cool_down(quiet)
        for merger in self.run.mergers:
            merger.weight = weight

    def roll_back(self, step: int) -> bool:
        """Go back to before the divergence that :meth:`needed` found. A collective.

        Returns:
            False if the run continues from where it is instead.

        Raises:
            UserError: if neither is possible.
        """
        assert self.divergence is not None, "a roll-back has a reason"
        if self.back.go(step, self.divergence):
            self.held = self.owed = False
            self._mark_healthy(self.back.cool_until - self.back.target)
            return True
        facts = {"reason": self.divergence.reason, "action": "the run goes on from here, since going back did not help"}
        self.run.tell(step, "level accepted", facts)
        if self.unhealthy is not None:
            self.detector.accept()
        self.unhealthy = self.divergence = None
        self.suspicious = self.held = False
        return False

    def commits(self, step: int, due: bool) -> bool:
        """Whether to make a checkpoint at this step, because it is ``due`` or one was held back. The same on all ranks."""
        if not self.section.enabled:
            return due
        if self.exchanged_at != step or not (due or self.owed):
            return False
        if self.held and not self.owed:
            self.run.tell(step, "checkpoint held", {"reason": "the last steps are suspicious"})
        self.owed = self.held
        return not self.held

    @property
    def problem(self) -> str | None:
        """Why this worker's state must not be saved; None if it may be."""
        return None if self.unhealthy is None else f"worker {self.mesh.worker} is unhealthy: {self.unhealthy.reason}"

    def before_the_end(self, step: int) -> None:
        """Exchange statuses once more before the final merges, in which unhealthy workers must not count. A collective.

        Raises:
            UserError: if most workers are unhealthy.
        """
        if not self.section.enabled or self.exchanged_at == step:
            return
        if self._majority_unhealthy(step):
            assert self.divergence is not None
            raise UserError(f"the run diverged at its last step, {step} ({self.divergence.reason}); see events.jsonl")

    def resume(self, step: int) -> None:
        """Carry out a roll-back to ``step`` that an earlier process began or ``distmerge recover`` planned, if there is one."""
        if self.back.resume(step):
            self.held = self.owed = False
            self._mark_healthy(self.back.cool_until - self.back.target)

    def state_dict(self) -> dict[str, Any]:
        unhealthy = None if self.unhealthy is None else tuple(self.unhealthy)
        flags = {name: getattr(self, name) for name in ("suspicious", "held", "owed", "notes")}
        return {"detector": self.detector.state_dict(), "back": self.back.state_dict(), "sick": unhealthy} | flags

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state["detector"])
        self.back.load_state_dict(state["back"])
        self.unhealthy = None if state["sick"] is None else Unhealthy(*state["sick"])
        self.suspicious, self.held, self.owed = state["suspicious"], state["held"], state["owed"]
        self.notes = [(step, event, reason) for step, event, reason in state["notes"]]
