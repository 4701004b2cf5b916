"""Roll-back: from a spike of the whole run to the newest stable checkpoint before it, optionally merged with earlier ones.

The plan is on disk before anything is done, so that the next start can finish it. Each further attempt at the same spike goes
further back, since the spike may have touched the checkpoint that did not help.
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
    """The parts of a run that recovery uses."""

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
    """Why a worker, or the whole run, cannot go on as it is.

    Attributes:
        since: the first step that the spike may have touched, with the safety margin subtracted.
        reason: one line for the user.
        finite: whether loss, gradient norm and parameters are still finite.
    """

    since: int
    reason: str
    finite: bool


class RollBack:
    """Rolls a run back and remembers earlier attempts. A roll-back does not restore this object's own state."""

    def __init__(self, section: config.RecoverySettings, run: Recoverable):
        self.section, self.run, self.mesh = section, run, run.mesh
        self.attempts = 0
        self.skipped: list[tuple[int, int]] = []
        self.last_spike = 0
        self.target = 0  # the step that the last attempt went back to
        self.accepted_at = 0  # the step at which the level was accepted because roll-backs had not helped
        self.cool_until = 0  # the step at which the cool-down ends

    def go(self, step: int, found: Unhealthy) -> bool:
        """Go back to before the spike of inner step ``step``. A collective.

        Returns:
            False if going back cannot help but all values are finite: the run should then continue from where it is.

        Raises:
            UserError: if going back cannot help and the run cannot continue.
        """
        self.run.store.wait()
        if step > max(self.last_spike, self.accepted_at) + 2 * self.section.window:
            self.attempts = 0
        again, self.attempts = self.attempts > 0, self.attempts + 1
        self.run.tell(step, "spike", {"reason": found.reason, "attempt": self.attempts})
        if self.attempts > self.section.attempts:
            return self._accept_or_raise(step, found, f"{self.section.attempts} roll-backs did not help")
        stable = self._stable(step, found, again)
        if not stable:
            return self._accept_or_raise(step, found, f"no valid checkpoint is older than step {max(found.since, 1)}")
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
        if window is not None and (discarded := [block.name for block in window.blocks if block.last_step > plan.to]):
            self.run.tell(step, "blocks tainted", {"blocks": discarded})
        self.run.load_checkpoint(stable[0])
        if window is not None:
            window.open(plan.to)
        self.carry_out(plan, kept)
        return True

    def _accept_or_raise(self, step: int, found: Unhealthy, why: str) -> bool:
        """Accept a finite loss if going back cannot help, but only once within two windows of steps; else raise."""
        recently = bool(self.accepted_at) and step <= self.accepted_at + 2 * self.section.window
        if found.finite and not recently:
            self.accepted_at = step
            return False
        grew = " after its level had been accepted" if found.finite else ""
        raise UserError(
            f"the run diverged at step {step} ({found.reason}){grew} and {why}; see events.jsonl, then lower optimizer.lr or "
            "raise recovery.attempts, or plan a roll-back yourself with distmerge recover"
        )

    def _stable(self, step: int, found: Unhealthy, again: bool) -> list[Path]:
        """The checkpoints to merge, newest first. They precede the spike and, on a further attempt, also the checkpoint of the
        last attempt; if there are none that old, only the spike."""
        before = max(found.since - 1, 0)  # the checkpoint of step 0 always precedes the spike
        bounds = [min(before, self.target - 1), before] if again and self.target else [before]
        reported: set[Path] = set()
        for bound in bounds:
            stable, rejections = self.run.store.valid(self.section.merge_last, up_to=bound)
            for rejection in rejections:
                if rejection.path not in reported:
                    reported.add(rejection.path)
                    facts = {"path": str(rejection.path), "reason": rejection.reason}
                    self.run.tell(step, "rejected checkpoint", facts)
            if stable:
                return stable
        return []

    def _members(self, stable: list[Path]) -> list[str]:
        """Names of what to merge, newest first: the window's blocks up to the checkpoint if they suffice, else checkpoints."""
        last, members = self.section.merge_last, [path.name for path in stable]
        with self.mesh.raise_on_all_ranks():
            if self.mesh.leads and last > 1:
                blocks = stable_blocks(self.run.path / "window", last, step_of(stable[0]))
                members = blocks if len(blocks) == last else members
        shared: list[Any] = [members]
        dist.broadcast_object_list(shared, 0)
        return shared[0]

    def resume(self, step: int) -> bool:
        """Carry out a roll-back to ``step`` that an earlier process began or ``distmerge recover`` planned, if there is one."""
        with self.mesh.raise_on_all_ranks():
            plan = read_plan(self.run.path)
        if plan is None or plan.to != step:
            return False
        self.carry_out(plan, None)
        return True

    def carry_out(self, plan: Plan, kept: optimizer_state.States | None) -> None:
        """Carry out a plan whose checkpoint has been loaded: merge its members and restore the optimizer's moments.

        Args:
            kept: the moments from before the roll-back, for "keep"; None after a restart, which has lost them.
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
        """Set theta, and the mergers' anchors, to the plain mean of the members over all workers."""
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
        """Apply ``plan.optimizer``; what was done, in words. For "rollback" nothing remains to be done, since the checkpoint's
        moments are loaded."""
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
                return "keep: the moments were lost in a restart, the checkpoint's were taken"
            if not optimizer_state.all_finite(kept):
                optimizer_state.reset(optimizers)
                return "keep: the moments were not finite and were reset"
            optimizer_state.put(optimizers, kept)
        return plan.optimizer

    def finish_tainting(self) -> None:
        """Set aside what an interrupted roll-back left to be tainted. Called before a start looks for checkpoints."""
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
