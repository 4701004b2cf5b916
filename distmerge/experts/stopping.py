"""Decides when an expert stops training, from its own losses or from those of its merge with other models.

Experts that train until their own loss is best merge worse: late steps memorise a few hard examples that a merge forgets.
Source: https://arxiv.org/abs/2506.14126. The rule "plateau" watches the expert's own loss and stops early; "merged" merges the
expert in memory at each published step, and watches the loss of the merge.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from distmerge.config.experts import Stopping
from distmerge.errors import UserError
from distmerge.rundir.layout import RunDirectory


class Plateau:
    """Lowers the learning rate when the loss no longer improves, a few times, and then stops."""

    def __init__(self, section: Stopping):
        self.section = section
        self.best, self.waited, self.reduced = math.inf, 0, 0

    @property
    def lr_factor(self) -> float:
        return self.section.factor**self.reduced

    def observe(self, loss: float) -> bool:
        """Take the loss of an evaluation. Returns whether training ends. NaN never counts as an improvement."""
        if improves(loss, self.best, self.section.tolerance):
            self.best, self.waited = loss, 0
            return False
        self.waited += 1
        if self.waited < self.section.patience:
            return False
        self.waited = 0
        if self.reduced < self.section.reductions:
            self.reduced += 1
            return False
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "reduced": self.reduced}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Peak:
    """Stops when ``patience`` losses in a row have not improved on the best one, and remembers the step of the best. Of equal
    losses the first is the best.

    Losses before step ``after`` do not count: during the warmup of the learning rate those of the merge go up and down, and an
    early low one would stop a run that has hardly learned anything.
    """

    def __init__(self, section: Stopping):
        self.section = section
        self.best, self.best_step, self.waited = math.inf, 0, 0

    def observe(self, step: int, loss: float) -> bool:
        """Take the loss of the merge at a published step. Returns whether training ends."""
        if step < self.section.after:
            return False
        if improves(loss, self.best, self.section.tolerance):
            self.best, self.best_step, self.waited = loss, step, 0
            return False
        self.waited += 1
        return self.waited >= self.section.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def improves(loss: float, best: float, tolerance: float) -> bool:
    """Whether a loss is below the best by more than the share ``tolerance`` of it; False for NaN."""
    return loss < best - tolerance * abs(best) if math.isfinite(best) else loss < best


def published_steps(run_dir: Path) -> dict[int, Path]:
    """The model directories of the steps that an expert's run has published, by step."""
    found = {int(path.name[5:]): path for path in (run_dir / "steps").glob("step-*")}
    return dict(sorted(found.items()))


def member_at(reference: str, step: int, patience_seconds: float | None) -> Path:
    """The directory of a model to merge with at a step.

    A model's directory stands for itself. A run stands for its newest published step that is not later than ``step`` or, if it
    has ended before ``step``, for its final model. At exactly its last published step it always stands for that step, whether
    it has ended by now or not, so that the result does not depend on which of two runs is ahead.

    Args:
        patience_seconds: how long to wait for a run that trains at the same time; None takes what is published already.

    Raises:
        UserError: when there is no such model.
    """
    path = Path(reference)
    deadline = time.monotonic() + (patience_seconds or 0.0)
    while True:
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            return path
        run, steps = RunDirectory(path), published_steps(path)
        ended = run.finished(1)
        diverged = ended is not None and bool(ended.get("diverged"))  # a run that diverged has no final model
        if ended is not None and not diverged and max(steps, default=0) < step:
            return run.final
        earlier = [where for at, where in steps.items() if at <= step]
        if earlier and (patience_seconds is None or diverged or max(steps) >= step):
            return earlier[-1]
        if diverged or time.monotonic() >= deadline:
            raise UserError(f"config.stopping.merge_with: {reference} has no model of step {step} or earlier")
        time.sleep(0.05)
