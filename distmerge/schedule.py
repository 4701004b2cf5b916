"""Learning-rate schedules. They are pure functions of the step, so checkpoints need no state for them."""

from __future__ import annotations

from distmerge.config.train import Schedule
from distmerge.rules.decay import DECAYS, with_floor


def lr_factor(schedule: Schedule, step: int, steps: int) -> float:
    """The learning rate of inner step ``step``, counted from 0, as a share of the peak rate.

    Args:
        steps: number of steps of the whole run.
    """
    if step < schedule.warmup:
        return (step + 1) / schedule.warmup
    if schedule.name == "constant":
        return 1.0
    if schedule.name == "wsd":
        curve, done = schedule.curve, max(0.0, (step - (steps - schedule.decay)) / schedule.decay)
    else:
        curve, done = schedule.name, (step - schedule.warmup) / max(1, steps - schedule.warmup)
    return with_floor(DECAYS[curve], schedule.floor)(done)
