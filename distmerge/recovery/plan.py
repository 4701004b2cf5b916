"""The plan of a roll-back. It is written to disk before anything is done, so that the next start can finish the roll-back.

``RUN_DIR/recovery.json`` names the checkpoint that the run goes back to, the checkpoints or blocks that are merged there, and
what later attempts need to know. It is in force as long as the newest checkpoint is the one that it goes back to.
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
    """A planned roll-back.

    Attributes:
        to: the step that the run goes back to.
        members: names of the checkpoints, or blocks, whose parameters are merged; one checkpoint is a plain roll-back.
        optimizer: what to do with the optimizer's moments: "keep", "reset", "average" or "rollback".
        spike: the step at which the divergence was detected; 0 for a manual recovery.
        attempts: roll-backs for this spike so far, this one included.
        skipped: ``(first, count)`` for each range of batches to leave out, in the order of the data.
        tainted: whether checkpoints and blocks newer than ``to`` have yet to be set aside.
    """

    to: int
    members: list[str]
    optimizer: str
    spike: int
    attempts: int
    skipped: list[tuple[int, int]]
    tainted: bool = True


def write_plan(run_dir: Path, plan: Plan) -> None:
    """Write the plan, then rename checkpoints and blocks newer than its target to ``step-N.tainted`` and ``block-N.tainted``.

    Newer ones are trusted again only after that: they then come from the training after the roll-back.
    """
    write_atomically(run_dir / FILE, json.dumps(asdict(plan), indent=1) + "\n")
    finish_tainting(run_dir, plan)


def finish_tainting(run_dir: Path, plan: Plan) -> None:
    """Set aside what is newer than the plan's target, unless that was done before; then note that it is done."""
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
    """The plan on disk; None if there is none.

    Raises:
        UserError: if it cannot be read.
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
    """The ``(first, count)`` range of batches to leave out around the batch of step ``spike``, which is counted from 1.

    Half of them come before that batch: ``skip_around(30, 4)`` is ``[(27, 4)]``, since step 30 consumes batch 29.
    """
    if not batches:
        return []
    first = max(0, spike - 1 - batches // 2)
    return [(first, batches)]


def batch_index(step: int, skipped: list[tuple[int, int]]) -> int:
    """Index of the batch that inner step ``step``, counted from 0, consumes if some are left out.

    With ``skipped = [(27, 4)]`` step 26 consumes batch 26 and step 27 consumes batch 31.
    """
    index = step
    for first, count in sorted(skipped):
        if index >= first:
            index += count
    return index
