"""A run verified: all that it published is hashed again, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distmerge.errors import UserError
from distmerge.files.directories import MANIFEST, published_directories, verify
from distmerge.rundir.identity import read_identity, stranger

PUBLISHED = (("checkpoints", "step", MANIFEST), ("window", "block", "block.json"), ("steps", "step", MANIFEST))
"""Where a run publishes: the directory, its entries' prefix, their manifest."""

MODELS = ("final", "final.diverged")
"""What a run's end publishes."""


class Verdict(NamedTuple):
    """Attributes: path, relative to the run directory; said, what became of it; damaged, whether that is to be repaired."""

    path: str
    said: str
    damaged: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.said}"


def verify_run(run_dir: Path) -> list[Verdict]:
    """One verdict for each published directory: checkpoints, blocks, steps, oldest first, then the final model; and for each
    that was set aside.

    Raises:
        UserError: where there is nothing to verify.
    """
    if not run_dir.is_dir():
        raise UserError(f"RUN_DIR must be a run's directory, got {run_dir}")
    verdicts: list[Verdict] = []
    identity = read_identity(run_dir)

    def judge(path: Path, manifest: str) -> None:
        problem = verify(path, name=manifest) or stranger(path, identity, manifest)
        verdicts.append(Verdict(path.relative_to(run_dir).as_posix(), problem or "ok", problem is not None))

    for place, prefix, manifest in PUBLISHED:
        for path in published_directories(run_dir / place, prefix):
            judge(path, manifest)
        for path in sorted((run_dir / place).glob(f"{prefix}-*.*")):
            # A roll-back sets aside what a spike touched: that is in order.
            why = path.suffix[1:]
            verdicts.append(Verdict(f"{place}/{path.name}", f"was set aside as {why}", why != "tainted"))
    for name in MODELS:
        if (run_dir / name).is_dir():
            judge(run_dir / name, MANIFEST)
    if not verdicts:
        raise UserError(f"RUN_DIR must hold checkpoints, window blocks or models, {run_dir} has none")
    return verdicts
