"""Spikes, in two stages: a step is suspected soon, and a run is called diverged only when it is.

The detector is pure: the loss and the gradient norm of a step go in, a verdict comes out. ``suspected`` says that the loss is
out of the ordinary (``tails.py`` learns what is ordinary). It costs little, since the caller only holds back what would be
published, so it comes early. ``diverged`` costs a roll-back, so it waits for proof:

- a loss or a gradient norm that is not finite, at once;
- a loss that still grows and has left what data can explain: half above the level before, or above the start's;
- a loss that grows for ``LIMIT`` steps on end;
- a loss that has been about as high as the untrained model's for ``PATIENCE`` steps and does not fall, or for ``LIMIT``.

A suspicion ends where the loss has been ordinary for ``CALM`` steps, and after ``PATIENCE`` steps where its new level stays
flat or falls: that is other data, and it is accepted as the new level. No suspicion is longer than ``LIMIT``. The gradient
norm helps to suspect, and proves something only where it is not finite: in healthy runs it bursts while the loss is calm.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, Literal, NamedTuple

from distmerge.recovery.baseline import LEAST_SAMPLES, LONG, NEGLIGIBLE, RISING, SHORT, TRENDS, History, trend

CALM = 4
"""Ordinary steps in a row that end a suspicion."""

PATIENCE = 40
"""Steps after which a new level is accepted that does not grow."""

MILD = 2.0
"""Times the limit up to which a suspicion that proved wrong is taken for this run's noise, however long it was."""

LIMIT = 100
"""Steps of the longest suspicion."""

UNEXPLAINED = 1.5
"""Times the level before, beyond which a loss that grows is not the data's."""

LEARNT = 0.75
"""Part of the start's loss below which a run has learnt: going back to the start's is then a divergence."""

MEMORY = 512
"""Steps for which a level that was left is remembered: coming back to it is ordinary."""

HIGH, SAME = 0.85, 1.15
"""Parts: of the start's loss that counts as being back there; of a level that counts as clearly above it."""


FIRST = 5
"""Steps whose median is the start's loss."""

UNUSUAL = (*RISING, "fall")

KEPT = ("start", "best", "calm", "quiet")


class Step(NamedTuple):
    """Logarithms of loss and gradient norm, their statistics beside the history, and why they are unusual, if they are."""

    value: float
    norm: float
    found: dict[str, float]
    unusual: str
    ratio: float = 0.0  # of the most unusual statistic to its limit


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
    """Judges each step; what follows from the verdict is the caller's to decide.

    Args:
        window: healthy steps from which the tails of the loss are learned.
        threshold: robust standard deviations from which a step of independent scatter is suspected.
    """

    def __init__(self, window: int, threshold: float):
        self.history = History(window, threshold)
        self.suspicious: list[Step] = []  # since the suspicion began
        self.left: list[tuple[int, list[float]]] = []  # levels that were left: for how many steps more, and their log losses
        self.first: list[float] = []
        self.start = 0.0  # loss of the first steps
        self.best = math.inf  # lowest level of LONG steps
        self.calm = self.quiet = 0

    def cool_down(self, steps: int) -> None:
        """The run went back: for ``steps`` steps, until past the spike's own step, only a non-finite value counts.

        The history stays as it was before the spike: the run is where it was.
        """
        self.quiet = steps
        self._release()

    def accept(self) -> None:
        """The caller goes on with this level, having used up its attempts to go back: take it as the normal one."""
        if self.suspicious:
            values = self._since_the_last_fall(self.history.limits()["fall"])
            self.start = max(self.start, UNEXPLAINED * self._loss(statistics.median(values[-max(TRENDS) :])))
            self._move(values)

    def check(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on one step. After "diverged" the caller says ``cool_down`` or ``accept``."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return Verdict("diverged", f"loss {loss}, gradient norm {grad_norm}", len(self.suspicious))
        if len(self.first) < FIRST:
            self.first.append(loss)
            self.start = statistics.median(self.first)
        self.left = [(steps - 1, losses) for steps, losses in self.left if steps > 1]
        step = self._seen(loss, math.log(max(grad_norm, 1e-30)))
        if self.quiet:
            self.quiet -= 1
            if not step.unusual:
                self._learn(step)
            return Verdict("healthy")
        if not step.unusual and not self.suspicious:
            self._learn(step)
            return Verdict("healthy")
        if self._is_back(step):
            return Verdict("healthy")
        self.suspicious.append(step)
        self.calm = 0 if step.unusual else self.calm + 1
        if self.calm == CALM:
            self._learn_scare()
            return Verdict("healthy")
        return self._judge(f"{self._why()} (loss {loss:.4g}, gradient norm {grad_norm:.4g})")

    def _seen(self, loss: float, norm: float) -> Step:
        """A step beside the history, and why it is unusual."""
        value = math.log(max(loss, 0.0) + self._negligible())
        if len(self.history.losses) < LEAST_SAMPLES:
            high = loss > UNEXPLAINED * self.start + self._negligible()
            return Step(value, norm, {}, "loss far above the start's" if high else "")
        newest = [*(step.value for step in self.suspicious), value]
        found = self.history.statistics(newest, [*(step.norm for step in self.suspicious), norm])
        limits = self.history.limits()
        ratios = {name: found[name] / limits[name] for name in UNUSUAL if name in found}
        if len(self.history.losses) < LONG:
            ratios.pop("fall", None)  # early on, learning is sudden
        name, ratio = max(ratios.items(), key=lambda item: item[1])
        if ratio > 1 and name == "fall":
            return Step(value, norm, found, f"loss too low: {math.exp(-found[name]):.2g} times the level", ratio)
        if ratio > 1:
            return Step(value, norm, found, f"loss too high: {name}, {ratio:.1f} times the usual", ratio)
        high = self._loss(statistics.median([*self.history.losses, *newest][-SHORT:])) > self._untrained()
        return Step(value, norm, found, f"loss as high as at the start ({self.start:.4g})" if high else "", ratio)

    def _judge(self, reason: str) -> Verdict:
        """A suspicion goes on, is proved, or ends with its level accepted."""
        steps, since = len(self.suspicious), len(self.suspicious) - 1
        limits, before = self.history.limits(), self._before()
        values = self._since_the_last_fall(limits["fall"])
        trends = {count: trend(values, count) for count in TRENDS if len(values) >= 2 * count}
        growing = {count for count, rise in trends.items() if rise > limits[f"trend of {count}"]}
        explained = max(min(UNEXPLAINED * before, max(self.start, SAME * before)), 4 * self._negligible())
        level = max((self._loss(statistics.median(values[-count:])) for count in growing), default=0.0)
        if level > explained:
            return Verdict("diverged", f"the loss grew from {before:.4g} to {level:.4g} and still grows: {reason}", since)
        longest = max(TRENDS)
        if steps < PATIENCE or (longest not in trends and steps < LIMIT):
            return Verdict("suspected", reason, since)
        level = self._loss(statistics.median(values[-longest:]))
        slope, usual = trends.get(longest, 0.0), limits[f"trend of {longest}"]
        high = longest in trends and level > max(before, self._untrained())
        if high and (slope > -0.5 * usual or level > 2 * self._untrained() or steps >= LIMIT):
            return Verdict("diverged", f"the loss stays at {level:.4g}, as at the start ({self.start:.4g}): {reason}", since)
        if high or (slope > 0.5 * usual and steps < LIMIT):
            return Verdict("suspected", reason, since)
        if slope > 0.5 * usual and trend(values, len(values) // 2) > usual:
            return Verdict("diverged", f"the loss has grown for {steps} steps, {before:.4g} to {level:.4g}: {reason}", since)
        self._move(values)
        return Verdict("healthy", f"a loss of {level:.4g} after {before:.4g} is the new level", since, accepted=True)

    def _since_the_last_fall(self, limit: float) -> list[float]:
        """Suspicious log losses; coming back from losses that were too low is not growing."""
        low = [step.found.get("fall", 0.0) > limit for step in self.suspicious]
        first = 0 if low[-1] or True not in low else len(low) - low[::-1].index(True)
        return [step.value for step in self.suspicious[first:]]

    def _before(self) -> float:
        """The loss before the suspicion."""
        if len(self.history.losses) < LEAST_SAMPLES:
            return self.start
        return self._loss(min(self.history.level(), self.history.level(LONG)))

    def _untrained(self) -> float:
        """The loss from which on a run knows no more than at its start, or is far above what it had."""
        best = min(self.best, self._before())
        return HIGH * self.start if best < LEARNT * self.start else UNEXPLAINED * best

    def _why(self) -> str:
        return next(step.unusual for step in reversed(self.suspicious) if step.unusual)

    def _negligible(self) -> float:
        return NEGLIGIBLE * abs(statistics.median(self.first)) + 1e-12

    def _loss(self, value: float) -> float:
        return math.exp(value) - self._negligible()

    def _is_back(self, step: Step) -> bool:
        """Whether the loss is back at a level that was left, which is then the level again."""
        usual = self.history.limits()["one step"]
        for index, (_, losses) in enumerate(self.left):
            level = statistics.median(losses[-LONG:])
            apart = abs(level - self.history.level()) > usual
            if apart and abs(step.value - level) < usual and self._loss(level) < self._untrained():
                del self.left[index]
                self._leave()
                self.history.move(losses, [])
                self._release()
                return True
        return False

    def _leave(self) -> None:
        self.left = [*self.left[-2:], (MEMORY, list(self.history.losses))]

    def _is_mild(self) -> bool:
        return max(step.ratio for step in self.suspicious) < MILD

    def _move(self, values: list[float]) -> None:
        """The level of these log losses is the normal one."""
        for step in self.suspicious if self._is_mild() else []:
            self.history.learn_unusual(step.found)
        if self.history.losses:
            self._leave()
        self.history.move(values, [step.norm for step in self.suspicious][-len(values) :])
        self._release()

    def _learn(self, step: Step) -> None:
        self.history.learn(step.value, step.norm, step.found)
        if len(self.history.losses) >= LONG:
            self.best = min(self.best, self._loss(self.history.level(LONG)))

    def _learn_scare(self) -> None:
        """A suspicion that passed by itself: a short or a mild one is this run's noise, any other was an event."""
        noise = len(self.suspicious) <= SHORT or self._is_mild()
        for step in self.suspicious:
            if not step.unusual:
                self._learn(step)
            elif noise:
                self.history.learn_unusual(step.found)
        self._release()

    def _release(self) -> None:
        self.suspicious, self.calm = [], 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and names, from which ``load_state_dict`` goes on bitwise."""
        kept = {name: getattr(self, name) for name in KEPT}
        return kept | {
            "history": self.history.state_dict(),
            "suspicious": [tuple(step) for step in self.suspicious],
            "left": [(steps, list(losses)) for steps, losses in self.left],
            "first": list(self.first),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in KEPT:
            setattr(self, name, state[name])
        self.history.load_state_dict(state["history"])
        self.suspicious = [Step(*step) for step in state["suspicious"]]
        self.left = [(steps, list(losses)) for steps, losses in state["left"]]
        self.first = list(state["first"])
