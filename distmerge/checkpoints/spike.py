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
from typing import Any, Literal, NamedTuple

LEAST_SAMPLES = 16

LEVEL_SAMPLES = 16

TOGETHER = 4
"""Steps whose mean excess is judged. The mean of n independent ones scatters by 1 / sqrt(n)."""

MOST_NORM_EXCESS = 6.0
"""What the gradient norm of one step counts at most, in robust standard deviations: one step does not decide for four."""

LEAST_SCALE = {"loss": 0.02, "gradient norm": 0.1}
"""Scatter below this is not believed: of the loss relative to its median, of the log of the gradient norm as it is."""


PATIENCE = 20
"""Steps after which a suspicion ends: in a roll-back where the loss still grows, else with its level accepted."""

CALM = 4
"""Ordinary steps in a row that end a suspicion."""


class Verdict(NamedTuple):
    """What the detector says of a step.

    Attributes:
        state: "healthy"; "suspected", while blocks and commits are to be held back; "diverged", when the run is to go back.
        reason: one line for people; empty where the step is healthy and nothing was decided.
        since: how many steps ago the suspicious stretch began; 0 is this step.
        accepted: True exactly at the step where a suspected level was accepted as the new normal one.
    """

    state: Literal["healthy", "suspected", "diverged"]
    reason: str = ""
    since: int = 0
    accepted: bool = False


class Detector:
    """Judges each step by its loss and its gradient norm; what follows from the verdict is the caller's to decide.

    Args:
        window: steps whose statistics a step is held against.
        threshold: robust standard deviations, of a mean of four steps, above the median.
    """

    def __init__(self, window: int, threshold: float):
        self.window, self.threshold = window, threshold
        self.samples: dict[str, deque[float]] = {name: deque(maxlen=window) for name in LEAST_SCALE}
        self.recent: dict[str, deque[float]] = {name: deque(maxlen=TOGETHER - 1) for name in LEAST_SCALE}
        self.quiet = 0
        self.suspicious: list[tuple[float, float]] = []  # the steps of a suspicion, the first one included
        self.calm = 0
        self.start: float | None = None

    def cool_down(self, steps: int) -> None:
        """The run went back: for ``steps`` steps, until past the spike's own step, only a non-finite value counts.

        The samples before the spike stay: they are of healthy steps, and the run is where it was.
        """
        self.quiet = steps
        self._release()

    def accept(self) -> None:
        """The caller goes on with this level, having used up its attempts to go back: take it as the normal one."""
        for name in self.samples:
            self.samples[name].clear()
        for values in self.suspicious:
            self._learn(*values)
        self._release()

    def _release(self) -> None:
        self.suspicious, self.calm = [], 0
        for excesses in self.recent.values():
            excesses.clear()

    def check(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on one step. "diverged" is repeated until the caller says ``cool_down`` or ``accept``, or all is well."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return Verdict("diverged", f"loss {loss}, gradient norm {grad_norm}", len(self.suspicious))
        self.start = loss if self.start is None else self.start
        reason = self._unusual(loss, grad_norm)
        if self.quiet:
            self.quiet -= 1
            self._learn(loss, grad_norm)
            return Verdict("healthy")
        if not self.suspicious and not reason:
            self._learn(loss, grad_norm)
            return Verdict("healthy")
        self.suspicious.append((loss, grad_norm))
        self.calm = 0 if reason else self.calm + 1
        since = len(self.suspicious) - 1
        if self.calm >= CALM:
            for values in self.suspicious[-CALM:]:
                self._learn(*values)
            self._release()
            return Verdict("healthy")
        if since < PATIENCE:
            return Verdict("suspected", reason or "not yet calm", since)
        losses = [loss for loss, _ in self.suspicious]
        older, newer = (statistics.median(part) for part in (losses[-PATIENCE : -PATIENCE // 2], losses[-PATIENCE // 2 :]))
        if newer > max(older, *losses[:1]) or newer > self.start:
            return Verdict("diverged", f"the loss grew from {older:.4g} to {newer:.4g}", since)
        self.accept()
        return Verdict("healthy", f"accepted a loss of {newer:.4g}", since, accepted=True)

    def _learn(self, loss: float, grad_norm: float) -> None:
        self.samples["loss"].append(loss)
        self.samples["gradient norm"].append(math.log(max(grad_norm, 1e-30)))

    def _unusual(self, loss: float, grad_norm: float) -> str:
        """Why this step is out of the ordinary; empty for one that is not."""
        values = {"loss": loss, "gradient norm": math.log(max(grad_norm, 1e-30))}
        excesses = {name: self._excess(name, value) for name, value in values.items()}
        of_four = {name: (sum(self.recent[name]) + excess) / math.sqrt(TOGETHER) for name, excess in excesses.items()}
        both = sum(of_four.values()) / math.sqrt(len(of_four))
        found = {"loss": of_four["loss"], "loss with gradient norm": both}
        reasons = [f"{name} {z:.1f} robust sigma above the last steps" for name, z in found.items() if z > self.threshold]
        if not self.quiet:
            for name in values:
                self.recent[name].append(excesses[name])
        return f"{' and '.join(reasons)} (loss {loss:.4g}, gradient norm {grad_norm:.4g})" if reasons else ""

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
        """Plain numbers, lists and names, from which ``load_state_dict`` goes on bitwise."""
        return {
            "samples": {name: list(samples) for name, samples in self.samples.items()},
            "recent": {name: list(excesses) for name, excesses in self.recent.items()},
            "quiet": self.quiet,
            "suspicious": list(self.suspicious),
            "calm": self.calm,
            "start": self.start,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.quiet, self.calm, self.start = state["quiet"], state["calm"], state["start"]
        self.suspicious = [(loss, norm) for loss, norm in state["suspicious"]]
        for name, samples in self.samples.items():
            samples.clear()
            samples.extend(state["samples"][name])
            self.recent[name].clear()
            self.recent[name].extend(state["recent"][name])
