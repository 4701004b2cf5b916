"""``distmerge verify RUN_DIR``: hash again all that a run published, and say what is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distmerge.checkpoints.durable import MANIFEST, published_directories, verify
from distmerge.errors import UserError

PUBLISHED = (("checkpoints", "step", MANIFEST), ("window", "block", "block.json"))
"""Where a run publishes: the directory, its entries' prefix, their manifest."""


class Verdict(NamedTuple):
    """Attributes: path, relative to the run directory; problem, None for what is as it was written."""

    path: str
    problem: str | None


def verify_run(run_dir: Path) -> list[Verdict]:
    """One verdict for each published directory, checkpoints first, oldest first; and for each that was set aside.

    Raises:
        UserError: where there is nothing to verify.
    """
    if not run_dir.is_dir():
        raise UserError(f"RUN_DIR must be a run's directory, got {run_dir}")
    verdicts: list[Verdict] = []
    for place, prefix, manifest in PUBLISHED:
        for path in published_directories(run_dir / place, prefix):
            verdicts.append(Verdict(f"{place}/{path.name}", verify(path, name=manifest)))
        for path in sorted((run_dir / place).glob(f"{prefix}-*.*")):
            verdicts.append(Verdict(f"{place}/{path.name}", f"was set aside as {path.suffix[1:]}"))
    if not verdicts:
        raise UserError(f"RUN_DIR must hold checkpoints or window blocks, {run_dir} has none")
    return verdicts
