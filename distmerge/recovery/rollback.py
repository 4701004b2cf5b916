"""Going back: from a spike of the whole run to a checkpoint before it, merged there with the stable ones before that.

What was decided is on disk before anything is done, so that whoever starts next finishes it. Each attempt at the same spike
goes further back than the one before, since a checkpoint that did not help may be a part of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist

from distmerge.checkpoints.store import Store, step_of
from distmerge.config import train as config
from distmerge.config.train import TrainConfig
from distmerge.engine.engine import Engine
from distmerge.errors import UserError
from distmerge.files.directories import guarded, reader
from distmerge.mesh import Mesh
from distmerge.recovery import optimizer_state
from distmerge.recovery.plan import Plan, batch_index, finish_tainting, read_plan, skip_around, write_plan
from distmerge.windows.blocks import TENSORS, merge_stored, stable_blocks
from distmerge.windows.window import Window
from distmerge.workers.merger import Merger


class Recoverable(Protocol):
    """What a recovery needs of a run."""

    config: TrainConfig
    step: int
    mesh: Mesh
    engine: Engine
    mergers: list[Merger]
    store: Store
    window: Window | None
    path: Path

    def load_checkpoint(self, path: Path) -> Any: ...
    def tell(self, step: int, event: str, facts: dict[str, Any]) -> None: ...


class Unhealthy(NamedTuple):
    """Why a worker, or the run, cannot go on as it is.

    Attributes:
        since: the first step that it may have touched, the margin included.
        finite: whether loss, gradient norm and parameters are still finite.
    """

    since: int
    reason: str
    finite: bool


class RollBack:
    """Goes back, and remembers what it tried: its state is not gone back to."""

    def __init__(self, section: config.RecoverySettings, run: Recoverable):
        self.section, self.run, self.mesh = section, run, run.mesh
        self.attempts = 0
        self.skipped: list[tuple[int, int]] = []
        self.last_spike = 0
        self.target = 0  # the step that the last attempt went back to
        self.accepted_at = 0  # the step whose level was accepted, since going back to before it had not helped
        self.cool_until = 0

    def go(self, step: int, found: Unhealthy) -> bool:
        """Go back to before the spike of inner step ``step``. A collective.

        Returns:
            False where going back cannot help, but all values are finite: the run is to go on from where it is.

        Raises:
            UserError: where it cannot help and the run cannot go on.
        """
        self.run.store.wait()
        if step > max(self.last_spike, self.accepted_at) + 2 * self.section.window:
            self.attempts = 0
        again, self.attempts = self.attempts > 0, self.attempts + 1
        self.run.tell(step, "spike", {"reason": found.reason, "attempt": self.attempts})
        if self.attempts > self.section.attempts:
            return self._go_on(step, found, f"{self.section.attempts} roll-backs did not cure it")
        stable = self._stable(step, found, again)
        if not stable:
            return self._go_on(step, found, f"no sound checkpoint is older than step {max(found.since, 1)}")
        at = batch_index(step - 1, self.skipped) + 1
        plan = Plan(
            to=step_of(stable[0]),
            members=self._members(stable),
            optimizer=self.section.keep_optimizer,
            spike=step,
            attempts=self.attempts,
            skipped=[*self.skipped, *skip_around(at, self.section.skip_batches)],
        )
        kept = optimizer_state.take(self.run.engine.optimizers)
        with self.mesh.raise_on_all_ranks():
            if self.mesh.leads:
                guarded(self.run.path, lambda: write_plan(self.run.path, plan))
        window = self.run.window
        if window is not None and (given_up := [block.name for block in window.blocks if block.last_step > plan.to]):
            self.run.tell(step, "blocks tainted", {"blocks": given_up})
        self.run.load_checkpoint(stable[0])
        if window is not None:
            window.open(plan.to)
        self.carry_out(plan, kept)
        return True

    def _go_on(self, step: int, found: Unhealthy, why: str) -> bool:
        """What to do where going back cannot help: a finite loss is accepted, unless one was and it went on growing."""
        recently = bool(self.accepted_at) and step <= self.accepted_at + 2 * self.section.window
        if found.finite and not recently:
            self.accepted_at = step
            return False
        grew = " after its level had been accepted" if found.finite else ""
        raise UserError(
            f"the run diverged at step {step} ({found.reason}){grew} and {why}; see events.jsonl, then lower optimizer.lr or "
            "raise recovery.attempts, or go back by hand with distmerge recover"
        )

    def _stable(self, step: int, found: Unhealthy, again: bool) -> list[Path]:
        """The checkpoints to merge, newest first: before the spike, and before the last attempt's where there are any."""
        before = max(found.since - 1, 0)  # the start itself is before everything
        bounds = [min(before, self.target - 1), before] if again and self.target else [before]
        told: set[Path] = set()
        for bound in bounds:
            stable, rejections = self.run.store.valid(self.section.merge_last, up_to=bound)
            for rejection in rejections:
                if rejection.path not in told:
                    told.add(rejection.path)
                    facts = {"path": str(rejection.path), "reason": rejection.reason}
                    self.run.tell(step, "rejected checkpoint", facts)
            if stable:
                return stable
        return []

    def _members(self, stable: list[Path]) -> list[str]:
        """The window's blocks up to the checkpoint, where there are enough of them; else checkpoints. Newest first."""
        last, members = self.section.merge_last, [path.name for path in stable]
        with self.mesh.raise_on_all_ranks():
            if self.mesh.leads and last > 1:
                blocks = stable_blocks(self.run.path / "window", last, step_of(stable[0]))
                members = blocks if len(blocks) == last else members
        told: list[Any] = [members]
        dist.broadcast_object_list(told, 0)
        return told[0]

    def resume(self, step: int) -> bool:
        """Finish a roll-back that an earlier process began, or that ``distmerge recover`` planned, if step is its target."""
        with self.mesh.raise_on_all_ranks():
            plan = read_plan(self.run.path)
        if plan is None or plan.to != step:
            return False
        self.carry_out(plan, None)
        return True

    def carry_out(self, plan: Plan, kept: optimizer_state.States | None) -> None:
        """Merge and restore at the plan's checkpoint, which is loaded.

        Args:
            kept: the live moments, for "keep"; None after a restart, when they are gone.
        """
        self.attempts, self.skipped, self.last_spike = plan.attempts, list(plan.skipped), plan.spike
        self.target = plan.to
        self.cool_until = max(plan.to, plan.spike) + self.section.cool_down
        merged = len(plan.members) > 1
        if merged:
            self._merge(plan.members)
        optimizer = self._restore_moments(plan, kept)
        facts = {"to": plan.to, "merged": plan.members, "optimizer": optimizer, "skipped": plan.skipped}
        self.run.tell(plan.to, "merged and rolled back" if merged else "rolled back", facts)

    @torch.no_grad()
    def _merge(self, members: list[str]) -> None:
        """theta = the plain mean of the members, over all workers; and so the anchor."""
        flat = self.run.engine.parameters
        own = f"parameters-{self.mesh.worker:05}.safetensors"
        stored = [
            (self.run.path / "window" / name, TENSORS)
            if name.startswith("block")
            else (self.run.path / "checkpoints" / name, own)
            for name in members
        ]
        merge_stored(stored, [1 / len(members)] * len(members), dict(flat.named_views()))
        flat.push()
        if self.run.mergers:
            dist.all_reduce(flat.vector, group=self.mesh.peers)
            flat.vector.div_(self.mesh.workers)
            flat.push()
        for merger in self.run.mergers:
            merger.restart()

    def _restore_moments(self, plan: Plan, kept: optimizer_state.States | None) -> str:
        """The loaded checkpoint's moments are in place: that is "rollback". What was done, in words."""
        optimizers = self.run.engine.optimizers
        if plan.optimizer == "reset":
            optimizer_state.reset(optimizers)
        elif plan.optimizer == "average":
            places = [self.run.path / "checkpoints" / name for name in plan.members if name.startswith("step")]
            if len(places) > 1:
                file = f"optimizer-{self.mesh.worker:05}.pt"
                optimizer_state.put(optimizers, optimizer_state.average([reader(path)(file) for path in places]))
        elif plan.optimizer == "keep":
            if kept is None:
                return "keep: the live moments are gone, the checkpoint's were taken"
            if not optimizer_state.all_finite(kept):
                optimizer_state.reset(optimizers)
                return "keep: the live moments were not finite, reset"
            optimizer_state.put(optimizers, kept)
        return plan.optimizer

    def finish_tainting(self) -> None:
        """Before a start looks for checkpoints: those that a plan calls tainted are none."""
        with self.mesh.raise_on_all_ranks():
            if self.mesh.leads and (plan := read_plan(self.run.path)) is not None:
                guarded(self.run.path, lambda: finish_tainting(self.run.path, plan))

    def state_dict(self) -> dict[str, Any]:
        names = ("attempts", "skipped", "last_spike", "target", "accepted_at", "cool_until")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)
        self.skipped = [(first, count) for first, count in state["skipped"]]
