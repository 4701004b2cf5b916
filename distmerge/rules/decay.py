"""Decay curves, for learning rate schedules and for the merge weights of a window (:mod:`distmerge.windows.curves`).

A curve is a non-increasing function d with d(0) = 1. Its argument x, from 0 to 1, is the share of the decay that is over; d(x)
is the share of the peak learning rate, or of an update's weight in a merge, that is left. The curve ``1-sqrt`` is from
https://arxiv.org/abs/2405.18392.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Decay = Callable[[float], float]

DECAYS: dict[str, Decay] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
"""The curves by name; all of them end at 0."""


def with_floor(decay: Decay, floor: float) -> Decay:
    """The curve scaled so that it ends at ``floor`` instead of 0: ``floor + (1 - floor) d(x)``."""
    return lambda x: floor + (1 - floor) * decay(x)


class Table:
    """A curve through the points (x, d), linear between them and constant after the last one.

    Attributes:
        x, d: ``[n]`` float64 each.

    Raises:
        ValueError: when there are fewer than 2 points, or x does not increase from 0 to at most 1.
    """

    def __init__(self, points: Sequence[tuple[float, float]]):
        self.x = np.array([x for x, _ in points], dtype=np.float64)
        self.d = np.array([d for _, d in points], dtype=np.float64)
        if len(points) < 2 or np.any(np.diff(self.x) <= 0):
            raise ValueError(f"a curve's table must have at least 2 points of increasing x, got {list(points)}")
        if self.x[0] != 0 or self.x[-1] > 1:
            raise ValueError(f"a curve's table must begin at x = 0 and end by x = 1, got x from {self.x[0]} to {self.x[-1]}")

    def __call__(self, x: float) -> float:
        return float(np.interp(x, self.x, self.d))
