"""The plan of a roll-back, on disk before anything is done: whoever starts next finishes it.

``RUN_DIR/recovery.json`` says to which checkpoint the run goes back, which checkpoints or blocks are merged there, and what
was learned on the way. It is in force as long as the newest checkpoint is the one that it goes back to.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from distmerge.checkpoints.store import published_checkpoints, step_of
from distmerge.errors import UserError
from distmerge.files.atomic import write_atomically
from distmerge.files.directories import set_aside
from distmerge.windows.blocks import mark_tainted, published_blocks

FILE = "recovery.json"


@dataclass(frozen=True)
class Plan:
    """Attributes:
    to: the step that the run goes back to.
    members: names of the checkpoints, or blocks, whose parameters are merged; one checkpoint is a plain roll-back.
    optimizer: what becomes of the moments: keep, reset, average, rollback.
    spike: the step that was called a spike; 0 for a roll-back by hand.
    attempts: roll-backs so far, this one included.
    skipped: ``(first, count)`` of batches left out, in the order of the data.
    tainted: whether checkpoints and blocks newer than ``to`` are still to be set aside.
    """

    to: int
    members: list[str]
    optimizer: str
    spike: int
    attempts: int
    skipped: list[tuple[int, int]]
    tainted: bool = True


def write_plan(run_dir: Path, plan: Plan) -> None:
    """Put the plan on disk, then set aside what is newer than its target as ``step-N.tainted``, ``block-N.tainted``.

    Only when that is done are newer ones trusted again: they are then of the new course.
    """
    write_atomically(run_dir / FILE, json.dumps(asdict(plan), indent=1) + "\n")
    finish_tainting(run_dir, plan)


def finish_tainting(run_dir: Path, plan: Plan) -> None:
    if not plan.tainted:
        return
    for path in published_checkpoints(run_dir / "checkpoints"):
        if step_of(path) > plan.to:
            set_aside(path, "tainted")
    for path in published_blocks(run_dir / "window"):
        if step_of(path) > plan.to:
            mark_tainted(path)
            set_aside(path, "tainted")
    write_atomically(run_dir / FILE, json.dumps(asdict(plan) | {"tainted": False}, indent=1) + "\n")


def read_plan(run_dir: Path) -> Plan | None:
    """The plan that is on disk, if there is one.

    Raises:
        UserError: when it cannot be read.
    """
    path = run_dir / FILE
    if not path.exists():
        return None
    try:
        keys = json.loads(path.read_text())
        return Plan(**keys | {"skipped": [(int(first), int(count)) for first, count in keys["skipped"]]})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete it to go on without the roll-back that it plans") from None


def skip_around(spike: int, batches: int) -> list[tuple[int, int]]:
    """The batches to leave out around that of step ``spike``, counted from 1: half of them before it, and it."""
    if not batches:
        return []
    first = max(0, spike - 1 - batches // 2)
    return [(first, batches)]


def batch_index(step: int, skipped: list[tuple[int, int]]) -> int:
    """Which batch of the data inner step ``step``, counted from 0, takes when some are left out."""
    index = step
    for first, count in sorted(skipped):
        if index >= first:
            index += count
    return index
