"""Verifies a run: hashes everything that it published again, and names what is damaged."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from distmerge.errors import UserError
from distmerge.files.directories import MANIFEST, published_directories, verify
from distmerge.rundir.identity import identity_problem, read_identity

PUBLISHED = (("checkpoints", "step", MANIFEST), ("window", "block", "block.json"), ("steps", "step", MANIFEST))
"""Where a run publishes: the directory, the prefix of its entries' names, the name of their manifest."""

MODELS = ("final", "final.diverged")
"""The directories that the end of a run publishes."""


class Verdict(NamedTuple):
    """The result for one directory.

    Attributes:
        path: relative to the run directory.
        said: "ok", the problem, or why it was set aside.
        damaged: whether the user has to act.
    """

    path: str
    said: str
    damaged: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.said}"


def verify_run(run_dir: Path) -> list[Verdict]:
    """One verdict for each directory that was published or set aside: checkpoints, blocks and steps, then the final model.

    Raises:
        UserError: if there is nothing to verify.
    """
    if not run_dir.is_dir():
        raise UserError(f"RUN_DIR must be a run's directory, got {run_dir}")
    verdicts: list[Verdict] = []
    identity = read_identity(run_dir)

    def judge(path: Path, manifest: str) -> None:
        problem = verify(path, name=manifest) or identity_problem(path, identity, manifest)
        verdicts.append(Verdict(path.relative_to(run_dir).as_posix(), problem or "ok", problem is not None))

    for place, prefix, manifest in PUBLISHED:
        for path in published_directories(run_dir / place, prefix):
            judge(path, manifest)
        for path in sorted((run_dir / place).glob(f"{prefix}-*.*")):
            # A roll-back sets tainted ones aside on purpose.
            why = path.suffix[1:]
            verdicts.append(Verdict(f"{place}/{path.name}", f"was set aside as {why}", why != "tainted"))
    for name in MODELS:
        if (run_dir / name).is_dir():
            judge(run_dir / name, MANIFEST)
    if not verdicts:
        raise UserError(f"RUN_DIR must hold checkpoints, window blocks or models, {run_dir} has none")
    return verdicts
