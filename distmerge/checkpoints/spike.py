"""Spikes: a loss or gradient norm far above what the last steps would make one expect, or one that is no number.

Robust statistics, since the sample is small and what is looked for would spoil it: of the loss and of the logarithm of the
gradient norm (whose scatter is multiplicative), the level is the median of the last steps. The scatter is the median distance
between successive steps, which a loss that falls does not widen as it widens the median absolute deviation; of the gradient
norm, whose level wanders in well runs, the larger of the two. A step is held against them together with the three before it:
one hard batch is not enough, unless it is beyond all measure, and a divergence that creeps is found before it is far away.
The loss counts alone and together with the gradient norm, which alone is high for some steps in well runs, too. Its tail is
heavy even in logarithms: one batch of a well run has four times the norm of all others and leaves no trace. So of one step
it counts no more than a bound (Huber's, https://doi.org/10.1214/aoms/1177703732), and what stays is told from what passes.
Samples that were called a spike stay out of the statistics: one NaN in a rolling window would blind it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from typing import Any

LEAST_SAMPLES = 16

LEVEL_SAMPLES = 16

TOGETHER = 4
"""Steps whose mean excess is judged. The mean of n independent ones scatters by 1 / sqrt(n)."""

MOST_NORM_EXCESS = 6.0
"""What the gradient norm of one step counts at most, in robust standard deviations: one step does not decide for four."""

LEAST_SCALE = {"loss": 0.02, "gradient norm": 0.1}
"""Scatter below this is not believed: of the loss relative to its median, of the log of the gradient norm as it is."""


class Detector:
    """Says of each step whether it is a spike.

    Args:
        window: steps whose statistics a step is held against.
        threshold: robust standard deviations, of a mean of four steps, above the median.
    """

    def __init__(self, window: int, threshold: float):
        self.window, self.threshold = window, threshold
        self.samples: dict[str, deque[float]] = {name: deque(maxlen=window) for name in LEAST_SCALE}
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=TOGETHER - 1) for name in LEAST_SCALE}
        self.quiet = 0

    def cool_down(self, steps: int) -> None:
        """For some steps only what is no number is a spike.

        The samples stay: they are of well steps, and after a roll-back the run is where it was. Begun anew, a few steps'
        scatter would be taken for the truth, and a hard batch for a spike.
        """
        self.quiet = steps
        self._forget_recent()

    def _forget_recent(self) -> None:
        for excesses in self.recent.values():
            excesses.clear()

    def check(self, loss: float, grad_norm: float) -> str | None:
        """Why this step is a spike; None for one that is not, which then joins the statistics."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"loss {loss}, gradient norm {grad_norm}"
        values = {"loss": loss, "gradient norm": math.log(max(grad_norm, 1e-30))}
        excesses = {name: self._excess(name, value) for name, value in values.items()}
        of_four = {name: (sum(self.recent[name]) + excess) / math.sqrt(TOGETHER) for name, excess in excesses.items()}
        both = sum(of_four.values()) / math.sqrt(len(of_four))
        found = {"loss": of_four["loss"], "loss with gradient norm": both}
        reasons = [f"{name} {z:.1f} robust sigma above the last steps" for name, z in found.items() if z > self.threshold]
        if reasons and not self.quiet:
            self._forget_recent()
            return f"{' and '.join(reasons)} (loss {loss:.4g}, gradient norm {grad_norm:.4g})"
        for name, value in values.items():
            self.samples[name].append(value)
            if not self.quiet:
                self.recent[name].append(excesses[name])
        self.quiet = max(0, self.quiet - 1)
        return None

    def _excess(self, name: str, value: float) -> float:
        """Robust standard deviations above the level; 0 while there are too few samples to tell."""
        samples = self.samples[name]
        if len(samples) < min(LEAST_SAMPLES, self.window):
            return 0.0
        level = statistics.median(list(samples)[-LEVEL_SAMPLES:])
        scatter = 1.4826 * statistics.median(abs(b - a) for a, b in itertools.pairwise(samples)) / math.sqrt(2)
        if name == "loss":
            return (value - level) / max(scatter, LEAST_SCALE[name] * abs(level))
        median = statistics.median(samples)
        deviation = 1.4826 * statistics.median(abs(sample - median) for sample in samples)
        return min(MOST_NORM_EXCESS, (value - level) / max(scatter, deviation, LEAST_SCALE[name]))

    def state_dict(self) -> dict[str, Any]:
        return {
            "samples": {name: list(samples) for name, samples in self.samples.items()},
            "recent": {name: list(excesses) for name, excesses in self.recent.items()},
            "quiet": self.quiet,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quiet = state["quiet"]
        for name, samples in self.samples.items():
            samples.clear()
            samples.extend(state["samples"][name])
            self.recent[name].clear()
            self.recent[name].extend(state["recent"][name])
