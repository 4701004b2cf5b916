"""Spikes: a loss or gradient norm far above what the last steps would make one expect, or one that is no number.

Robust statistics, since the sample is small and what is looked for would spoil it: the median and the median absolute
deviation of the last steps, of the loss and of the logarithm of the gradient norm (whose scatter is multiplicative).
Samples that were called a spike stay out of the statistics: one NaN in a rolling window would blind it.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Any

LEAST_SAMPLES = 16

LEAST_SCALE = {"loss": 0.02, "gradient norm": 0.1}
"""Scatter below this is not believed: of the loss relative to its median, of the log of the gradient norm as it is."""


class Detector:
    """Says of each step whether it is a spike.

    Args:
        window: steps whose statistics a step is held against.
        threshold: robust standard deviations above the median.
    """

    def __init__(self, window: int, threshold: float):
        self.window, self.threshold = window, threshold
        self.samples: dict[str, deque[float]] = {name: deque(maxlen=window) for name in LEAST_SCALE}
        self.quiet = 0

    def reset(self, quiet: int) -> None:
        """Forget all samples; for ``quiet`` steps only what is no number is a spike."""
        for samples in self.samples.values():
            samples.clear()
        self.quiet = quiet

    def check(self, loss: float, grad_norm: float) -> str | None:
        """Why this step is a spike; None for one that is not, which then joins the statistics."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return f"loss {loss}, gradient norm {grad_norm}"
        values = {"loss": loss, "gradient norm": math.log(max(grad_norm, 1e-30))}
        reasons = [] if self.quiet else [reason for name, value in values.items() if (reason := self._against(name, value))]
        self.quiet = max(0, self.quiet - 1)
        if reasons:
            return f"{' and '.join(reasons)} (loss {loss:.4g}, gradient norm {grad_norm:.4g})"
        for name, value in values.items():
            self.samples[name].append(value)
        return None

    def _against(self, name: str, value: float) -> str | None:
        samples = self.samples[name]
        if len(samples) < min(LEAST_SAMPLES, self.window):
            return None
        median = statistics.median(samples)
        least = LEAST_SCALE[name] * (abs(median) if name == "loss" else 1.0)
        scale = max(1.4826 * statistics.median(abs(sample - median) for sample in samples), least)
        z = (value - median) / scale
        return f"{name} {z:.1f} robust sigma above its median" if z > self.threshold else None

    def state_dict(self) -> dict[str, Any]:
        return {"samples": {name: list(samples) for name, samples in self.samples.items()}, "quiet": self.quiet}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quiet = state["quiet"]
        for name, samples in self.samples.items():
            samples.clear()
            samples.extend(state["samples"][name])
