"""Recovery: what a run does about a spike.

While a step is merely suspicious, nothing that the run would later trust is made of it: blocks and checkpoints are held, and
released when the run is healthy again. From a divergence of the whole run it goes back to a checkpoint before it
(:mod:`distmerge.recovery.rollback`). One unhealthy worker among several takes part in merges with weight 0 and starts again
from what the others share.

Each worker judges its own steps, its ranks together, at every step. The workers hear of each other where they meet anyway:
where a merge, a checkpoint or an evaluation is due and at the last step, before anything is merged. All decisions that
concern more than one worker are made there, from what all were told, and so are the same on all. Every decision is a line of
events.jsonl.
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


class Word(NamedTuple):
    """What a worker tells the others.

    Attributes:
        unhealthy: why it cannot go on, if it cannot.
        suspicious: whether what it does now must not be trusted yet.
        notes: ``(step, event, reason)`` of what it decided since they last met.
    """

    unhealthy: Unhealthy | None
    suspicious: bool
    notes: list[tuple[int, str, str]]


class Recovery:
    """Detection and decision; part of the run's state, except where it goes back: it remembers what it tried.

    Attributes:
        suspicious: whether this worker's last steps must not be trusted yet.
        held: whether blocks and checkpoints are held, as of the last time that the workers met.
        owed: whether a checkpoint was due while they were.
    """

    def __init__(self, section: config.RecoverySettings, run: Recoverable):
        self.section, self.run, self.mesh = section, run, run.mesh
        self.detector = Detector(section.window, section.threshold)
        self.back = RollBack(section, run)
        self.unhealthy: Unhealthy | None = None  # this worker, until the next merge
        self.found: Unhealthy | None = None  # the whole run
        self.suspicious = self.held = self.owed = False
        self.met = -1  # the step at which the workers last told each other
        self.notes: list[tuple[int, str, str]] = []

    def lr_factor(self, step: int) -> float:
        """What the learning rate of inner step ``step``, counted from 0, is multiplied with."""
        return self.section.lr_factor if step < self.back.cool_until else 1.0

    def batches_of(self, step: int) -> range:
        """The batches between the last step's and that of ``step``, counted from 0: those to leave out, then the one to
        take."""
        before = batch_index(step - 1, self.back.skipped) if step else -1
        return range(before + 1, batch_index(step, self.back.skipped) + 1)

    def needed(self, step: int, result: StepResult) -> bool:
        """Whether the whole run has to go back after inner step ``step``, counted from 1. A collective where workers meet.

        Among several workers, a majority that is unhealthy is a spike of the whole run; a minority leaves the merge.
        """
        if not self.section.enabled:
            return False
        self._heed(step, *self._verdict(result))
        window = self._window_of_workers()
        if window is not None and self.unhealthy is not None and not self.unhealthy.finite:
            window.taint()
        return self._meeting(step) and self._agreed(step)

    def _verdict(self, result: StepResult) -> tuple[Verdict, bool]:
        """The detector's verdict, and whether loss, gradient norm and the parameters after the step are finite.

        The loss is of before the step: an update that is not finite shows in theta alone, and must be seen before theta is
        merged or kept.
        """
        flat = self.run.engine.parameters
        flat.pull()
        total = flat.vector.sum()
        if self.mesh.shards > 1:  # the loss and the norm are the worker's already, theta is this rank's part
            dist.all_reduce(total, group=self.mesh.inside)
        loss, norm, total = torch.stack([result.loss, result.grad_norm, total]).tolist()
        verdict = self.detector.check(loss, norm)
        if math.isfinite(loss) and math.isfinite(norm) and not math.isfinite(total) and not self._theta_finite():
            verdict = Verdict("diverged", "the update left parameters that are not finite", verdict.since)
            return verdict, False
        return verdict, math.isfinite(loss) and math.isfinite(norm)

    def _theta_finite(self) -> bool:
        """A closer look, on all ranks of the worker: a sum of finite values may overflow."""
        healthy = torch.tensor([float(finite(self.run.engine.parameters.vector))])
        if self.mesh.shards > 1:
            dist.all_reduce(healthy, dist.ReduceOp.MIN, group=self.mesh.inside)
        return bool(healthy.item())

    def _heed(self, step: int, verdict: Verdict, healthy: bool) -> None:
        """Note what the verdict on this worker's step means for it."""
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

    def _meeting(self, step: int) -> bool:
        """Whether the workers tell each other at this step; of one worker the ranks always know the same."""
        config = self.run.config
        due = step == config.steps or any(step % every == 0 for every in (config.checkpoint.every, config.evaluate.every))
        return due or self.mesh.workers == 1 or any(merger.due() for merger in self.run.mergers)

    def _agreed(self, step: int) -> bool:
        """Whether most workers are unhealthy. If fewer are, they leave this merge, and the blocks they touched are marked."""
        self.met = step
        words = self._words()
        for at, event, reason in (note for word in words for note in word.notes):
            self.run.tell(at, event, {"reason": reason})
        unhealthy = {worker: word.unhealthy for worker, word in enumerate(words) if word.unhealthy is not None}
        self.held = any(word.suspicious for word in words if word.unhealthy is None)
        if 2 * len(unhealthy) > self.mesh.workers:
            reasons = [
                f"worker {worker}: {of.reason}" if self.mesh.workers > 1 else of.reason for worker, of in unhealthy.items()
            ]
            all_finite = all(of.finite for of in unhealthy.values())
            self.found = Unhealthy(min(of.since for of in unhealthy.values()), "; ".join(reasons), all_finite)
            return True
        if unhealthy:
            self._leave_out(step, unhealthy)
        elif not self.held and self.run.window is not None and (released := self.run.window.release()):
            self.run.tell(step, "blocks released", {"blocks": released})
        return False

    def _words(self) -> list[Word]:
        word, self.notes = Word(self.unhealthy, self.suspicious, self.notes), []
        if self.mesh.workers == 1:
            return [word]
        told: list[Any] = [None] * self.mesh.world
        dist.all_gather_object(told, word)
        return told[:: self.mesh.shards]

    def _leave_out(self, step: int, unhealthy: dict[int, Unhealthy]) -> None:
        """Unhealthy workers take part in this step's merges with weight 0; afterwards they start again."""
        reasons = "; ".join(f"worker {worker}: {of.reason}" for worker, of in unhealthy.items())
        facts = {"workers": sorted(unhealthy), "reason": reasons, "action": "weight 0, starts again"}
        self.run.tell(step, "sick worker", facts)
        window = self.run.window
        if window is not None:
            anchored = self._window_of_workers() is None
            if not anchored or any(of.finite for of in unhealthy.values()):
                window.taint()  # of the anchors: earlier merges may have taken in what had begun to diverge
            if marked := window.taint_published(min(of.since for of in unhealthy.values()), held_only=anchored):
                self.run.tell(step, "blocks tainted", {"blocks": marked})
        for merger in self.run.mergers:
            merger.weight = float(self.unhealthy is None)
        if self._anchor() is None:
            self._start_from_the_others()

    def _window_of_workers(self) -> Window | None:
        """The window, where its blocks hold what each worker's steps made; anchors hold what healthy workers merged."""
        window = self.run.window
        return window if window is not None and window.anchored is None else None

    def _anchor(self) -> Tensor | None:
        return next((merger.anchor for merger in self.run.mergers if merger.anchor is not None), None)

    @torch.no_grad()
    def _start_from_the_others(self) -> None:
        """Where nothing is shared but theta, unhealthy workers take the mean of the healthy ones, also of the buffers."""
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
        """After the merges of a step at which the workers met, an unhealthy one starts again from the anchor. It gets fresh
        moments where its own are not finite or are not to be kept."""
        if self.unhealthy is None or self.met != step:
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
        last = step == self.run.config.steps  # what it is then is not its own work, and must not count at the end
        self._mark_healthy(self.section.cool_down, weight=0.0 if last else 1.0)

    def _mark_healthy(self, quiet: int, weight: float = 1.0) -> None:
        self.unhealthy = self.found = None
        self.suspicious = False
        self.detector.cool_down(quiet)
        for merger in self.run.mergers:
            merger.weight = weight

    def roll_back(self, step: int) -> bool:
        """Go back to before what :meth:`needed` found; False where the run goes on from where it is instead. A collective.

        Raises:
            UserError: where neither is possible.
        """
        assert self.found is not None, "a roll-back has a reason"
        if self.back.go(step, self.found):
            self.held = self.owed = False
            self._mark_healthy(self.back.cool_until - self.back.target)
            return True
        facts = {"reason": self.found.reason, "action": "the run goes on from here: going back did not help"}
        self.run.tell(step, "level accepted", facts)
        if self.unhealthy is not None:
            self.detector.accept()
        self.unhealthy = self.found = None
        self.suspicious = self.held = False
        return False

    def commits(self, step: int, due: bool) -> bool:
        """Whether a checkpoint of this step is to be made, ``due`` or owed from when one was. The same on all ranks."""
        if not self.section.enabled:
            return due
        if self.met != step or not (due or self.owed):
            return False
        if self.held and not self.owed:
            self.run.tell(step, "checkpoint held", {"reason": "the last steps are suspicious"})
        self.owed = self.held
        return not self.held

    @property
    def problem(self) -> str | None:
        """Why this worker's state must not be kept, if it must not."""
        return None if self.unhealthy is None else f"worker {self.mesh.worker} is out of order: {self.unhealthy.reason}"

    def before_the_end(self, step: int) -> None:
        """Before what was begun is merged for the last time: unhealthy workers must not count. A collective.

        Raises:
            UserError: where most workers are unhealthy.
        """
        if not self.section.enabled or self.met == step:
            return
        if self._agreed(step):
            assert self.found is not None
            raise UserError(f"the run diverged at step {step} ({self.found.reason}), and it was to end there; see events.jsonl")

    def resume(self, step: int) -> None:
        """Finish a roll-back that an earlier process began, or that ``distmerge recover`` planned, if step is its target."""
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
