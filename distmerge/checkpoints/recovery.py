"""Recovery: what a run does about a spike.

Of the whole run: go back to a stable checkpoint before the spike's start, merge the last stable ones there, restore or
reset the inner optimizer, leave out the batches around the spike, go on. ``merge_last = 1`` is the plain roll-back. Of one
worker among several: it takes part in merges with weight 0 and starts again from what the others share. Every decision is
a line of events.jsonl; after ``attempts`` roll-backs the run stops and says so, since going back does not cure a
structural instability.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge import config
from distmerge.checkpoints import moments
from distmerge.checkpoints.block import accumulate, stable_blocks
from distmerge.checkpoints.durable import guarded, reader
from distmerge.checkpoints.plan import Plan, batch_index, finish_tainting, read_plan, skip_around, write_plan
from distmerge.checkpoints.spike import Detector
from distmerge.checkpoints.store import Store, step_of
from distmerge.checkpoints.window import Window
from distmerge.engine.engine import Engine, StepResult
from distmerge.errors import UserError
from distmerge.mesh import Mesh


class Recoverable(Protocol):
    """What a roll-back needs of a run."""

    step: int
    mesh: Mesh
    engine: Engine
    mergers: list[Any]
    store: Store
    window: Window | None
    path: Path

    def load_checkpoint(self, path: Path) -> Any: ...
    def tell(self, step: int, event: str, facts: dict[str, Any]) -> None: ...


class Recovery:
    """Detection and decision; part of the run's state, except where it goes back: it remembers what it tried."""

    def __init__(self, section: config.Recovery, run: Recoverable):
        self.section, self.run, self.mesh = section, run, run.mesh
        self.detector = Detector(section.window, section.threshold)
        self.sick: tuple[int, str] | None = None  # from which step, the margin included, and why, until the next merge
        self.reason = ""
        self.attempts = 0
        self.skipped: list[tuple[int, int]] = []
        self.last_spike = 0
        self.cool_until = 0

    def lr_factor(self, step: int) -> float:
        """What the learning rate of inner step ``step``, counted from 0, is multiplied with."""
        return self.section.lr_factor if step < self.cool_until else 1.0

    def batches_of(self, step: int) -> range:
        """The batches between the last step's and that of ``step``, counted from 0: those to leave out, then the one to
        take."""
        before = batch_index(step - 1, self.skipped) if step else -1
        return range(before + 1, batch_index(step, self.skipped) + 1)

    def needed(self, step: int, result: StepResult) -> bool:
        """Whether the whole run must go back after inner step ``step``, counted from 1. A collective where a merge is due.

        Each worker watches itself. Among several workers a sick one is known to the others only when
        they merge: most of them sick is the whole run's spike; fewer take part with weight 0.
        """
        if not self.section.enabled:
            return False
        verdict = self.detector.check(*torch.stack([result.loss, result.grad_norm]).tolist())
        reason = verdict.reason if verdict.state == "diverged" else None
        if self.mesh.workers == 1:
            self.reason = reason or ""
            return reason is not None
        if reason is not None and self.sick is None:
            self.sick = (step - self.section.margin, reason)
        if self.sick is not None and (window := self._window_of_workers()) is not None:
            window.taint()
        return any(merger.due() for merger in self.run.mergers) and self._agreed(step)

    def _agreed(self, step: int) -> bool:
        """Whether most workers are sick. If fewer are, those leave this merge, and the blocks that they touched are marked."""
        told: list[tuple[int, str] | None] = [None] * self.mesh.world
        dist.all_gather_object(told, self.sick)
        sick = {rank // self.mesh.shards: found for rank, found in enumerate(told) if found is not None}
        if not sick:
            return False
        self.reason = "; ".join(f"worker {worker}: {reason}" for worker, (_, reason) in sick.items())
        if 2 * len(sick) > self.mesh.workers:
            return True
        self.run.tell(step, "sick worker", {"workers": sorted(sick), "reason": self.reason, "action": "weight 0, starts again"})
        if (window := self._window_of_workers()) is not None:
            self._tell_tainted(step, window.taint_published(min(since for since, _ in sick.values())))
        for merger in self.run.mergers:
            merger.weight = float(self.sick is None)
        if self._anchor() is None:
            self._start_from_the_others()
        return False

    def _window_of_workers(self) -> Window | None:
        """The window, where its blocks hold what each worker's steps made; anchors hold what was merged, by the well."""
        window = self.run.window
        return window if window is not None and window.anchored is None else None

    def _tell_tainted(self, step: int, blocks: list[str]) -> None:
        if blocks:
            self.run.tell(step, "blocks tainted", {"blocks": blocks})

    def _anchor(self) -> Tensor | None:
        return next((merger.anchor for merger in self.run.mergers if merger.anchor is not None), None)

    @torch.no_grad()
    def _start_from_the_others(self) -> None:
        """Where nothing is shared but theta: the sick take the mean of the well."""
        flat = self.run.engine.parameters
        flat.pull()
        message = torch.cat([flat.vector, flat.vector.new_ones(1)])
        if self.sick is not None:
            message.zero_()
        dist.all_reduce(message, group=self.mesh.peers)
        if self.sick is not None:
            torch.div(message[:-1], message[-1], out=flat.vector)
            flat.push()

    @torch.no_grad()
    def cure(self, step: int, merges: list[Any]) -> None:
        """After a merge, a sick worker starts again from the anchor, with fresh moments where its own are no numbers."""
        if self.sick is None or not merges:
            return
        anchor, flat = self._anchor(), self.run.engine.parameters
        if anchor is not None:
            flat.vector.copy_(anchor)
            flat.push()
        if self.section.keep_optimizer != "keep" or not moments.finite(moments.take(self.run.engine.optimizers)):
            moments.reset(self.run.engine.optimizers)
        self._be_well()

    def _be_well(self) -> None:
        self.sick = None
        self.detector.cool_down(self.section.cool_down)
        for merger in self.run.mergers:
            merger.weight = 1.0

    def blocks_commit(self, step: int) -> bool:
        """Whether a checkpoint of this step would hold a sick worker; it is then left out. A collective."""
        if not self.section.enabled or self.mesh.workers == 1:
            return False
        sick = torch.tensor([float(self.sick is not None)])
        dist.all_reduce(sick, group=self.mesh.files)
        if sick.item():
            self.run.tell(step, "checkpoint left out", {"reason": f"{int(sick.item())} ranks are out of order"})
        return bool(sick.item())

    def roll_back(self, step: int) -> None:
        """Go back to before the spike of inner step ``step``.

        Raises:
            UserError: after too many attempts, or where no stable checkpoint is left.
        """
        self.run.store.wait()
        section = self.section
        if step > self.last_spike + 2 * section.window:
            self.attempts = 0
        self.attempts += 1
        self.run.tell(step, "spike", {"reason": self.reason, "attempt": self.attempts})
        if self.attempts > section.attempts:
            raise self._stop(step, f"{section.attempts} roll-backs did not cure it")
        stable, rejections = self.run.store.valid(section.merge_last, up_to=step - 1 - section.margin)
        for rejection in rejections:
            self.run.tell(step, "rejected checkpoint", {"path": str(rejection.path), "reason": rejection.reason})
        if not stable:
            raise self._stop(step, f"no checkpoint is at least {section.margin} steps older")
        at = batch_index(step - 1, self.skipped) + 1
        plan = Plan(
            to=step_of(stable[0]),
            members=self._members(stable),
            optimizer=section.keep_optimizer,
            spike=step,
            attempts=self.attempts,
            skipped=[*self.skipped, *skip_around(at, section.skip_batches)],
        )
        kept = moments.take(self.run.engine.optimizers)
        with self.mesh.together():
            if self.mesh.leads:
                guarded(self.run.path, lambda: write_plan(self.run.path, plan))
        given_up = [block.name for block in self.run.window.blocks if block.last_step > plan.to] if self.run.window else []
        self._tell_tainted(step, given_up)
        self.run.load_checkpoint(stable[0])
        if self.run.window is not None:
            self.run.window.open(plan.to)
        self.carry_out(plan, kept)

    def _stop(self, step: int, why: str) -> UserError:
        return UserError(
            f"the run diverged at step {step} ({self.reason}) and {why}; see events.jsonl, then lower optimizer.lr or "
            "raise recovery.attempts, or go back by hand with distmerge recover"
        )

    def _members(self, stable: list[Path]) -> list[str]:
        """The window's blocks up to the checkpoint, where there are enough of them; else checkpoints. Newest first."""
        last, members = self.section.merge_last, [path.name for path in stable]
        with self.mesh.together():
            if self.mesh.leads and last > 1:
                blocks = stable_blocks(self.run.path / "window", last, step_of(stable[0]))
                members = blocks if len(blocks) == last else members
        told: list[Any] = [members]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def resume(self, step: int) -> None:
        """Finish a roll-back that an earlier process began, or that ``distmerge recover`` planned, if step is its target."""
        with self.mesh.together():
            plan = read_plan(self.run.path)
        if plan is not None and plan.to == step:
            self.carry_out(plan, None)

    def carry_out(self, plan: Plan, kept: moments.States | None) -> None:
        """Merge and restore at the plan's checkpoint, which is loaded.

        Args:
            kept: the live moments, for "keep"; None after a restart, when they are gone.
        """
        self.attempts, self.skipped, self.last_spike = plan.attempts, list(plan.skipped), plan.spike
        self.cool_until = plan.to + self.section.cool_down if plan.spike == 0 else plan.spike + self.section.cool_down
        merged = len(plan.members) > 1
        if merged:
            self._merge(plan.members)
        optimizer = self._restore_moments(plan, kept)
        self.reason = ""
        self._be_well()
        facts = {"to": plan.to, "merged": plan.members, "optimizer": optimizer, "skipped": plan.skipped}
        self.run.tell(plan.to, "merged and rolled back" if merged else "rolled back", facts)

    @torch.no_grad()
    def _merge(self, members: list[str]) -> None:
        """theta = the plain mean of the members, over all workers; and so the anchor."""
        flat = self.run.engine.parameters
        views = dict(flat.named_views())
        for view in views.values():
            view.zero_()
        for name in members:
            place = "window" if name.startswith("block") else "checkpoints"
            pattern = "*.safetensors" if place == "window" else f"parameters-{self.mesh.worker:05}.safetensors"
            accumulate(self.run.path / place / name, 1 / len(members), views, pattern)
        flat.push()
        if self.run.mergers:
            dist.all_reduce(flat.vector, group=self.mesh.peers)
            flat.vector.div_(self.mesh.workers)
            flat.push()
        for merger in self.run.mergers:
            merger.restart()

    def _restore_moments(self, plan: Plan, kept: moments.States | None) -> str:
        """The loaded checkpoint's moments are in place: that is "rollback". What was done, in words."""
        optimizers = self.run.engine.optimizers
        if plan.optimizer == "reset":
            moments.reset(optimizers)
        elif plan.optimizer == "average":
            places = [self.run.path / "checkpoints" / name for name in plan.members if name.startswith("step")]
            if len(places) > 1:
                file = f"optimizer-{self.mesh.worker:05}.pt"
                moments.put(optimizers, moments.average([reader(path)(file) for path in places]))
        elif plan.optimizer == "keep":
            if kept is None:
                return "keep: the live moments are gone, the checkpoint's were taken"
            if not moments.finite(kept):
                moments.reset(optimizers)
                return "keep: the live moments were no numbers, reset"
            moments.put(optimizers, kept)
        return plan.optimizer

    def finish_tainting(self) -> None:
        """Before a start looks for checkpoints: those that a plan calls tainted are none."""
        with self.mesh.together():
            if self.mesh.leads and (plan := read_plan(self.run.path)) is not None:
                guarded(self.run.path, lambda: finish_tainting(self.run.path, plan))

    def state_dict(self) -> dict[str, Any]:
        names = ("attempts", "last_spike", "cool_until", "sick")
        return {"detector": self.detector.state_dict(), "skipped": self.skipped} | {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state["detector"])
        self.skipped = [(first, count) for first, count in state["skipped"]]
        for name in ("attempts", "last_spike", "cool_until", "sick"):
            setattr(self, name, state[name])
