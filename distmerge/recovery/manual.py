"""Manual recovery: a roll-back that the user plans for a run that crashed or diverged.

A checkpoint is stable if its hashes verify and all its values are finite. The plan is written to the run directory, and newer
checkpoints and blocks are set aside. The next start of ``distmerge train`` carries out the plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distmerge.checkpoints.health import unsound_checkpoint
from distmerge.checkpoints.store import published_checkpoints, step_of
from distmerge.errors import UserError
from distmerge.files.atomic import delete
from distmerge.files.directories import guarded, verify
from distmerge.recovery.plan import Plan, read_plan, skip_around, write_plan
from distmerge.rundir.identity import identity_problem, read_identity
from distmerge.rundir.layout import Lock, RunDirectory


@dataclass(frozen=True)
class ManualRecovery:
    """A planned roll-back.

    Attributes:
        plan: as it was written to the run directory.
        rejected: the name of each checkpoint that was passed over, and why.
    """

    plan: Plan
    rejected: tuple[str, ...] = ()

    def __str__(self) -> str:
        plan = self.plan
        what = f"merge {', '.join(plan.members)} at" if len(plan.members) > 1 else "go back to"
        rejected = f"; rejected {'; '.join(self.rejected)}" if self.rejected else ""
        return f"the next distmerge train will {what} step {plan.to}, optimizer: {plan.optimizer}{rejected}"


def plan_manual_recovery(
    run_dir: Path, before: int | None, merge_last: int, optimizer: str, skip_batches: int
) -> ManualRecovery:
    """Plan the roll-back of a run that is not in use.

    Args:
        before: the step at which the run went wrong: only checkpoints before it are used; None for the newest stable ones.
        merge_last: the number of stable checkpoints that are merged into the state from which the run continues; 1 is a plain
            roll-back.
        optimizer: what to do with the optimizer's state: "reset", "average" or "rollback".
        skip_batches: the number of batches around ``before`` that are left out.

    Raises:
        UserError: if there is no run, it is in use, or it has no stable checkpoint.
    """
    if not (run_dir / "checkpoints").is_dir():
        raise UserError(f"RUN_DIR must be a run's directory with checkpoints, got {run_dir}")
    lock = Lock(RunDirectory(run_dir))
    lock.take_job(patience_seconds=0)
    stable, rejected = stable_checkpoints(run_dir, before, merge_last)
    if not stable:
        where = f" before step {before}" if before is not None else ""
        raise UserError(f"{run_dir} has no stable checkpoint{where}" + (f" ({'; '.join(rejected)})" if rejected else ""))
    earlier = read_plan(run_dir)
    plan = Plan(
        to=step_of(stable[0]),
        members=[path.name for path in stable],
        optimizer=optimizer,
        spike=0,
        attempts=0,
        skipped=[*(earlier.skipped if earlier else []), *skip_around(before or 0, skip_batches)],
    )
    guarded(run_dir, lambda: write_plan(run_dir, plan))
    guarded(run_dir, lambda: delete(run_dir / "summary.json"))  # it describes an end that is undone
    lock.release()
    return ManualRecovery(plan, tuple(rejected))


def stable_checkpoints(run_dir: Path, before: int | None, count: int) -> tuple[list[Path], list[str]]:
    """The newest ``count`` stable checkpoints before a step, newest first; and those passed over, each with the reason."""
    identity = read_identity(run_dir)
    stable: list[Path] = []
    rejected: list[str] = []
    for path in reversed(published_checkpoints(run_dir / "checkpoints")):
        if (before is None or step_of(path) < before) and len(stable) < count:
            problem = verify(path) or identity_problem(path, identity) or unsound_checkpoint(path)
            if problem is None:
                stable.append(path)
            else:
                rejected.append(f"{path.name}: {problem}")
    return stable, rejected
