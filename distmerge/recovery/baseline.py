"""What is ordinary for a run's loss, learned from the run's own history.

Losses are compared as logarithms, so that scatter is relative to the level; losses that are tiny beside the initial loss count
as nearly equal. Several statistics of the newest 1 to 32 steps are compared with the level before them. A statistic is unusual
when it exceeds the larger of two limits: what independent noise would produce, by a robust estimate of the scatter, and 1.25
times the largest value seen in the run's healthy past. The second limit learns whatever tail a run has: rare hard batches,
correlated losses, epochs. Medians and minima keep a single batch from deciding for many.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from typing import Any

MIN_SAMPLES = 16
"""With fewer healthy steps than this, only a loss 50% above the initial loss is unusual."""

SHORT, LONG = 16, 64
"""Steps whose median is the level. Statistics of a few steps use the short one, which follows a falling loss; statistics of
many steps use the long one."""

MIN_SCALE = 0.01
"""Lower bound of the estimated relative scatter."""

INITIAL_SCALE = 0.3
"""Relative scatter assumed until there are ``MIN_SAMPLES`` healthy steps."""

NEGLIGIBLE = 0.005
"""Fraction of the initial loss below which differences between losses do not matter."""

TAIL_FACTOR = 1.25
"""A statistic is unusual only if it exceeds the largest one of the history by this factor."""

MIN_FALL = 0.4
"""A loss is never called too low before its logarithm has fallen by this much: learning may be sudden."""

SLOW = (8, 32)
"""Numbers of steps of the slow statistics."""

JOINT_STEPS = 4
"""Number of steps over which loss and gradient norm are judged jointly."""

MAX_NORM_DEVIATIONS = 6.0
"""In the joint statistic the gradient norm of one step counts at most this many robust standard deviations: its tail is heavy
even in healthy runs."""

MIN_LOSS_DEVIATIONS = 1.0
"""The joint statistic is 0 unless the loss alone is this many standard deviations above its level."""

MIN_NORM_SCALE = 0.1
"""Lower bound of the estimated scatter of the log gradient norm."""

TRENDS = (5, 10, 20)
"""A trend of n steps is the median of the last n log losses minus the median of the n before them."""

QUICK = ("one step", "mean of 2", "least of 3", "with gradient norm", "fall")
"""Statistics of a few steps; "fall" is the smaller of the last two distances below the level."""

RISING = (*QUICK[:4], *(f"median of {steps}" for steps in SLOW))
NAMES = (*RISING, "fall", *(f"trend of {steps}" for steps in TRENDS))

EXPECTED = {"one step": 1.0, "mean of 2": 0.71, "least of 3": 0.5, "with gradient norm": 1.2, "fall": 1.0}
"""Standard deviation of each statistic if steps are independent, in units of the standard deviation of one step. The variance
of a median of n normal values is about pi / 2n = 1.57 / n."""
EXPECTED |= {f"median of {steps}": math.sqrt(1.57 / steps + 1.57 / LONG) for steps in SLOW}
EXPECTED |= {f"trend of {steps}": math.sqrt(2 * 1.57 / steps) for steps in TRENDS}


LAG = 64
"""Steps after which the statistics of a healthy step are learned: a slow ramp must not widen the limits meant to detect it."""


class Tail:
    """The newest values of a statistic, and the largest of them."""

    def __init__(self, length: int):
        self.values: deque[float] = deque(maxlen=length)
        self.largest = 0.0

    def append(self, value: float) -> None:
        dropped = self.values[0] if len(self.values) == self.values.maxlen else None
        self.values.append(value)
        self.largest = max(self.largest, value) if dropped != self.largest else max(0.0, *self.values)

    def replace(self, values: list[float]) -> None:
        self.values.clear()
        self.values.extend(values)
        self.largest = max(0.0, *values) if values else 0.0


class History:
    """The healthy steps of a run: the level of the loss, its scatter, and the tails of all statistics.

    Args:
        window: number of healthy steps whose statistics are remembered.
        threshold: a statistic of independent steps is unusual above this many robust standard deviations.
    """

    def __init__(self, window: int, threshold: float):
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=LONG + 2 * max(TRENDS))  # logarithms
        self.norms: deque[float] = deque(maxlen=2 * LONG)  # logarithms of gradient norms
        self.excesses: deque[float] = deque(maxlen=JOINT_STEPS - 1)  # of the last steps, each above the level at that step
        self.waiting: deque[dict[str, float]] = deque()  # statistics that are not learned yet
        self.tails = {name: Tail(window) for name in NAMES}

    def level(self, steps: int = SHORT) -> float:
        """Median log loss of the last ``steps`` healthy steps."""
        return statistics.median(list(self.losses)[-steps:])

    def scale(self) -> float:
        """Robust standard deviation of the log loss. It is taken from successive differences, since a falling loss would widen
        any estimate around one level."""
        if len(self.losses) < MIN_SAMPLES:
            return INITIAL_SCALE
        distances = [abs(b - a) for a, b in itertools.pairwise(self.losses)]
        return max(MIN_SCALE, 1.4826 * statistics.median(distances) / math.sqrt(2))

    def limits(self) -> dict[str, float]:
        """For each statistic the value above which it is unusual."""
        independent = self.threshold * self.scale()
        limits = {name: max(independent * EXPECTED[name], TAIL_FACTOR * tail.largest) for name, tail in self.tails.items()}
        limits["fall"] = max(limits["fall"], MIN_FALL)
        return limits

    def statistics(self, newest: list[float], norms: list[float]) -> dict[str, float]:
        """The statistics of the newest step.

        Args:
            newest: log losses of the steps that are not in the history, in order, the newest step last; at least one.
            norms: log gradient norms of the same steps.
        """
        before = list(self.losses)
        short, long = self.level(), self.level(LONG)
        excesses = [*self.excesses, *(loss - short for loss in newest[-JOINT_STEPS:])][-JOINT_STEPS:]
        found = {
            "one step": excesses[-1],
            "mean of 2": sum(excesses[-2:]) / 2,
            "least of 3": min(excesses[-3:]),
            "with gradient norm": self._joint_excess(excesses, norms),
            "fall": -max(excesses[-2:]),
        }
        losses = (before + newest)[-2 * max(TRENDS) - LONG :]
        for steps in SLOW:
            past = losses[-steps - LONG : -steps] if len(newest) < steps else before[-LONG:]
            found[f"median of {steps}"] = statistics.median(losses[-steps:]) - (statistics.median(past) if past else long)
        for steps in TRENDS:
            if len(losses) >= 2 * steps:
                found[f"trend of {steps}"] = trend(losses, steps)
        return found

    def _joint_excess(self, excesses: list[float], norms: list[float]) -> float:
        """How far loss and log gradient norm of the last steps are jointly above their levels, in the units of the log loss; 0
        if the loss alone is ordinary."""
        before, scale = list(self.norms), self.scale()
        loss = sum(excesses) / scale / math.sqrt(JOINT_STEPS)
        if loss < MIN_LOSS_DEVIATIONS:
            return 0.0
        level, center = statistics.median(before[-SHORT:]), statistics.median(before)
        spread = max(MIN_NORM_SCALE, 1.4826 * statistics.median(abs(norm - center) for norm in before))
        deviations = [min(MAX_NORM_DEVIATIONS, (norm - level) / spread) for norm in [*before, *norms][-JOINT_STEPS:]]
        return scale * (loss + sum(deviations) / math.sqrt(JOINT_STEPS)) / math.sqrt(2)

    def learn(self, loss: float, norm: float, found: dict[str, float]) -> None:
        """Take a healthy step into the history.

        Args:
            loss, norm: logarithms of the loss and of the gradient norm.
            found: the step's statistics; empty while there are too few steps for any. They are learned ``LAG`` steps later.
        """
        self.losses.append(loss)
        self.norms.append(norm)
        if found:
            self.excesses.append(found["one step"])
            self.waiting.append(found)
        while len(self.waiting) > LAG:
            self._widen(self.waiting.popleft())

    def learn_unusual(self, found: dict[str, float]) -> None:
        """Learn the statistics of a step that looked unusual but was healthy. Those of a few steps are learned at once, or else
        every hard batch would be suspected for the next ``LAG`` steps."""
        for name in QUICK:
            if name in found:
                self.tails[name].append(found[name])
        self.waiting.append({name: value for name, value in found.items() if name not in QUICK})

    def _widen(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            self.tails[name].append(value)

    def move(self, losses: list[float], norms: list[float]) -> None:
        """Take the level of these steps, given as logarithms, as the new normal one. The tails are kept."""
        self.losses.clear()
        self.losses.extend(losses)
        self.norms.extend(norms)
        self.excesses.clear()

    def state_dict(self) -> dict[str, Any]:
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "excesses": list(self.excesses),
            "waiting": [dict(found) for found in self.waiting],
            "tails": {name: list(tail.values) for name, tail in self.tails.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("losses", "norms", "excesses", "waiting"):
            values = getattr(self, name)
            values.clear()
            values.extend(state[name])
        for name, tail in self.tails.items():
            tail.replace(state["tails"][name])


def trend(losses: list[float], steps: int) -> float:
    """Median of the last ``steps`` log losses minus the median of as many before them.

    For example ``trend([2.0, 2.1, 2.0, 2.4, 2.5, 2.4], 3)`` is 2.4 - 2.0 = 0.4: the loss grew by a factor of e^0.4.
    """
    return statistics.median(losses[-steps:]) - statistics.median(losses[-2 * steps : -steps])
