"""What is ordinary for a run's loss, learned from the run's own history.

Losses are taken as logarithms, so that scatter is relative to the level; where a loss is small beside that of the start, its
scatter counts less. Several statistics of the newest steps, from one step to 32, are each held against the level before
them. What a statistic may be without being unusual is the larger of two limits: what independent noise would make of it,
by a robust scale, and somewhat beyond what it has been in the run's healthy past. The second learns whatever tail a run has:
rare hard batches, correlated losses, epochs. Medians and minima keep one batch from deciding for many.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from typing import Any

LEAST_SAMPLES = 16
"""Healthy steps without which only a loss of half above the start's is unusual."""

SHORT, LONG = 16, 64
"""Steps whose median is the level: for statistics of few steps, which a falling loss must not blind, and of many."""

FLOOR = 0.01
"""Relative scatter below this is not believed."""

UNKNOWN = 0.3
"""Relative scatter of a run that has not got so far."""

NEGLIGIBLE = 0.005
"""Beside this part of the start's loss, a loss is as good as none."""

BEYOND = 1.25
"""A statistic is unusual from this many times the largest one of the history on."""

LEAST_FALL = 0.4
"""A fall of the log loss below which it is never too low: learning may be sudden."""

SLOW = (8, 32)
"""Steps of the slow statistics."""

TOGETHER, MOST, LEAST_LOSS = 4, 6.0, 1.0
"""Loss and gradient norm are judged together over so many steps. One step's gradient norm counts at most ``MOST`` robust
standard deviations, since its tail is heavy in healthy runs, and only where the loss is ``LEAST_LOSS`` above its level."""

NORM_FLOOR = 0.1
"""Scatter of the log gradient norm below this is not believed."""

TRENDS = (5, 10, 20)
"""A trend is the median of so many steps, less that of as many before them."""

QUICK = ("one step", "mean of 2", "least of 3", "with gradient norm", "fall")
"""Statistics of few steps; "fall" is the smaller of the last two falls below the level."""

RISING = (*QUICK[:4], *(f"median of {steps}" for steps in SLOW))
NAMES = (*RISING, "fall", *(f"trend of {steps}" for steps in TRENDS))

EXPECTED = {"one step": 1.0, "mean of 2": 0.71, "least of 3": 0.5, "with gradient norm": 1.2, "fall": 1.0}
"""Scatter of each statistic where steps are independent, in that of one step."""
EXPECTED |= {f"median of {steps}": math.sqrt(1.57 / steps + 1.57 / LONG) for steps in SLOW}
EXPECTED |= {f"trend of {steps}": math.sqrt(2 * 1.57 / steps) for steps in TRENDS}


LAG = 64
"""Steps after which a healthy step's statistics are learned: a slow ramp must not widen the limits that are to find it."""


class Tail:
    """The newest values of a statistic, and the largest of them."""

    def __init__(self, length: int):
        self.values: deque[float] = deque(maxlen=length)
        self.largest = 0.0

    def append(self, value: float) -> None:
        gone = self.values[0] if len(self.values) == self.values.maxlen else None
        self.values.append(value)
        self.largest = max(self.largest, value) if gone != self.largest else max(0.0, *self.values)

    def replace(self, values: list[float]) -> None:
        self.values.clear()
        self.values.extend(values)
        self.largest = max(0.0, *values) if values else 0.0


class History:
    """The healthy steps of a run: their level, their scatter, their tails.

    Args:
        window: steps of the history.
        threshold: robust standard deviations from which a statistic of independent steps is unusual.
    """

    def __init__(self, window: int, threshold: float):
        self.threshold = threshold
        self.losses: deque[float] = deque(maxlen=LONG + 2 * max(TRENDS))  # logarithms
        self.norms: deque[float] = deque(maxlen=2 * LONG)  # logarithms of gradient norms
        self.excesses: deque[float] = deque(maxlen=TOGETHER - 1)  # of the last steps, above the level that was theirs
        self.waiting: deque[dict[str, float]] = deque()  # statistics that are not yet learned
        self.tails = {name: Tail(window) for name in NAMES}

    def level(self, steps: int = SHORT) -> float:
        return statistics.median(list(self.losses)[-steps:])

    def scale(self) -> float:
        """Of successive differences, which a falling loss does not widen."""
        if len(self.losses) < LEAST_SAMPLES:
            return UNKNOWN
        distances = [abs(b - a) for a, b in itertools.pairwise(self.losses)]
        return max(FLOOR, 1.4826 * statistics.median(distances) / math.sqrt(2))

    def limits(self) -> dict[str, float]:
        """From where on each statistic is unusual."""
        independent = self.threshold * self.scale()
        limits = {name: max(independent * EXPECTED[name], BEYOND * tail.largest) for name, tail in self.tails.items()}
        limits["fall"] = max(limits["fall"], LEAST_FALL)
        return limits

    def statistics(self, newest: list[float], norms: list[float]) -> dict[str, float]:
        """Of the newest step.

        Args:
            newest: log losses since the history ends, in order; one at least.
            norms: log gradient norms of the same steps.
        """
        before = list(self.losses)
        short, long = self.level(), self.level(LONG)
        excesses = [*self.excesses, *(loss - short for loss in newest[-TOGETHER:])][-TOGETHER:]
        found = {
            "one step": excesses[-1],
            "mean of 2": sum(excesses[-2:]) / 2,
            "least of 3": min(excesses[-3:]),
            "with gradient norm": self._together(excesses, norms),
            "fall": -max(excesses[-2:]),
        }
        together = (before + newest)[-2 * max(TRENDS) - LONG :]
        for steps in SLOW:
            past = together[-steps - LONG : -steps] if len(newest) < steps else before[-LONG:]
            found[f"median of {steps}"] = statistics.median(together[-steps:]) - (statistics.median(past) if past else long)
        for steps in TRENDS:
            if len(together) >= 2 * steps:
                found[f"trend of {steps}"] = trend(together, steps)
        return found

    def _together(self, excesses: list[float], norms: list[float]) -> float:
        """Excess of loss and log gradient norm over the last steps, in the loss's units; 0 where the loss is calm."""
        before, scale = list(self.norms), self.scale()
        loss = sum(excesses) / scale / math.sqrt(TOGETHER)
        if loss < LEAST_LOSS:
            return 0.0
        level, center = statistics.median(before[-SHORT:]), statistics.median(before)
        spread = max(NORM_FLOOR, 1.4826 * statistics.median(abs(norm - center) for norm in before))
        norm = sum(min(MOST, (norm - level) / spread) for norm in [*before, *norms][-TOGETHER:]) / math.sqrt(TOGETHER)
        return scale * (loss + norm) / math.sqrt(2)

    def learn(self, loss: float, norm: float, found: dict[str, float]) -> None:
        """A healthy step and its statistics."""
        self.losses.append(loss)
        self.norms.append(norm)
        if found:
            self.excesses.append(found["one step"])
            self.waiting.append(found)
        while len(self.waiting) > LAG:
            self._widen(self.waiting.popleft())

    def learn_unusual(self, found: dict[str, float]) -> None:
        """Statistics of a step that looked unusual and was healthy: those of few steps at once, or every hard batch would be
        suspected for ``LAG`` steps."""
        for name in QUICK:
            if name in found:
                self.tails[name].append(found[name])
        self.waiting.append({name: value for name, value in found.items() if name not in QUICK})

    def _widen(self, found: dict[str, float]) -> None:
        for name, value in found.items():
            self.tails[name].append(value)

    def move(self, losses: list[float], norms: list[float]) -> None:
        """To another level, that of these steps; the tails stay."""
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
            kept = getattr(self, name)
            kept.clear()
            kept.extend(state[name])
        for name, tail in self.tails.items():
            tail.replace(state["tails"][name])


def trend(losses: list[float], steps: int) -> float:
    return statistics.median(losses[-steps:]) - statistics.median(losses[-2 * steps : -steps])
