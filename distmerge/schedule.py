"""Learning-rate schedules, as pure functions of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from distmerge.config.train import Schedule


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The share of the peak learning rate that inner step ``step`` (counted from 0) of ``steps`` takes."""
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    floor = schedule.floor
    progress = (step - schedule.warmup) / max(1, steps - schedule.warmup)
    match schedule.name:
        case "constant":
            return 1.0
        case "linear":
            return floor + (1 - floor) * (1 - progress)
        case "cosine":
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))
        case "wsd":
            progress = max(0.0, (step - (steps - schedule.decay)) / schedule.decay)
            return floor + (1 - floor) * decayed(schedule.curve, progress)


def decayed(curve: str, x: float) -> float:
    """A decay curve from 1 at x = 0 to 0 at x = 1."""
    match curve:
        case "linear":
            return 1 - x
        case "1-sqrt":
            return 1 - math.sqrt(x)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * x))
    raise AssertionError(f"no decay curve {curve}")
