"""``distmerge verify RUN_DIR``: hash again all that a run published, and say what is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distmerge.checkpoints.durable import MANIFEST, published_directories, verify
from distmerge.errors import UserError

PUBLISHED = (("checkpoints", "step", MANIFEST), ("window", "block", "block.json"))
"""Where a run publishes: the directory, its entries' prefix, their manifest."""


class Verdict(NamedTuple):
    """Attributes: path, relative to the run directory; said, what became of it; damaged, whether that is to be repaired."""

    path: str
    said: str
    damaged: bool


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
            problem = verify(path, name=manifest)
            verdicts.append(Verdict(f"{place}/{path.name}", problem or "ok", problem is not None))
        for path in sorted((run_dir / place).glob(f"{prefix}-*.*")):
            # A roll-back sets aside what a spike touched: that is in order.
            why = path.suffix[1:]
            verdicts.append(Verdict(f"{place}/{path.name}", f"was set aside as {why}", why != "tainted"))
    if not verdicts:
        raise UserError(f"RUN_DIR must hold checkpoints or window blocks, {run_dir} has none")
    return verdicts
