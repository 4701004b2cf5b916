"""When to stop an expert: state machines over losses, and the merge that one of them watches.

Experts that train to their own best merge worse: late steps memorise a few hard examples that a merge forgets. Source:
https://arxiv.org/abs/2506.14126. "plateau" watches the expert alone and is quick to stop; "merged" merges the expert, at each
published step, in memory, and watches the merge.
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
    """Lower the rate when the loss no longer improves, then stop."""

    def __init__(self, section: Stopping):
        self.section = section
        self.best, self.waited, self.reduced = math.inf, 0, 0

    @property
    def lr_factor(self) -> float:
        return self.section.factor**self.reduced

    def observe(self, loss: float) -> bool:
        """Whether this loss ends the training. What is no number is no improvement."""
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
    """Stop some observations after the best one, and remember which that was. Of equal ones the first is the best.

    Nothing before step ``after`` counts: a rate that warms up moves the first merges up and down, and a lucky one of them would
    end a training in which nothing was learned.
    """

    def __init__(self, section: Stopping):
        self.section = section
        self.best, self.best_step, self.waited = math.inf, 0, 0

    def observe(self, step: int, loss: float) -> bool:
        """Whether this loss ends the training."""
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
    return loss < best - tolerance * abs(best) if math.isfinite(best) else loss < best


def published_steps(run_dir: Path) -> dict[int, Path]:
    """The model directories that an expert's run published on its way, by step."""
    found = {int(path.name[5:]): path for path in (run_dir / "steps").glob("step-*")}
    return dict(sorted(found.items()))


def member_at(reference: str, step: int, patience_seconds: float | None) -> Path:
    """What a model to merge with is at a step: itself, or of a run, its newest published step that is not later.

    A run that ended before is its final model; at its last published step it is that step's, whether or not it has ended by
    now, so that nothing depends on which of two runs is ahead.

    Args:
        patience_seconds: how long to wait for a run that trains at the same time; None takes what is there.

    Raises:
        UserError: when there is nothing.
    """
    path = Path(reference)
    deadline = time.monotonic() + (patience_seconds or 0.0)
    while True:
        if (path / "config.json").exists() or (path / "adapter_config.json").exists():
            return path
        run, steps = RunDirectory(path), published_steps(path)
        ended = run.finished(1)
        diverged = ended is not None and bool(ended.get("diverged"))  # then there is no final model
        if ended is not None and not diverged and max(steps, default=0) < step:
            return run.final
        earlier = [where for at, where in steps.items() if at <= step]
        if earlier and (patience_seconds is None or diverged or max(steps) >= step):
            return earlier[-1]
        if diverged or time.monotonic() >= deadline:
            raise UserError(f"config.stopping.merge_with: {reference} holds no model of step {step} or before")
        time.sleep(0.05)
