"""Detects spikes in two stages: a step is suspected early, and a run is called diverged only on proof.

The detector has no side effects: the loss and the gradient norm of a step go in, a verdict comes out. ``suspected`` says that
the loss is out of the ordinary (:mod:`distmerge.recovery.baseline` learns what is ordinary). A suspicion is cheap, since the
caller only holds back what it would publish, so it is raised early. ``diverged`` costs a roll-back, so it needs proof:

- a loss or a gradient norm that is not finite proves it at once;
- the loss still grows and is higher than other data can explain: 50% above the level before, or above the initial loss;
- the loss has grown for ``LIMIT`` steps in a row;
- the loss has been about as high as the untrained model's for ``PATIENCE`` steps without falling, or for ``LIMIT`` steps.

A suspicion ends when the loss has been ordinary for ``CALM`` steps. It also ends after ``PATIENCE`` steps if the new level is
flat or falls: then the data has changed, and the level is accepted. No suspicion lasts longer than ``LIMIT`` steps. A high
gradient norm adds to a suspicion but proves nothing unless it is not finite: in healthy runs it bursts while the loss is calm.
"""

from __future__ import annotations

import math
import statistics
from typing import Any, Literal, NamedTuple

from distmerge.recovery.baseline import LONG, MIN_SAMPLES, NEGLIGIBLE, RISING, SHORT, TRENDS, History, trend

CALM = 4
"""A suspicion ends after this many ordinary steps in a row."""

PATIENCE = 40
"""A new level that does not grow is accepted after this many steps."""

MILD_FACTOR = 2.0
"""A false alarm that stayed below this multiple of the limits was this run's noise, however long it lasted."""

LIMIT = 100
"""Steps of the longest possible suspicion."""

GROWTH_FACTOR = 1.5
"""Other data does not explain a growing loss that exceeds the level before by this factor."""

LEARNED_SHARE = 0.75
"""A run has learned something once its loss is below this share of the initial loss. To return to that is then a divergence."""

MEMORY = 512
"""Steps for which a former level is remembered: to return to it is ordinary."""

UNTRAINED_SHARE = 0.85
"""A loss above this share of the initial loss counts as that of an untrained model."""

CLEARLY_ABOVE = 1.15
"""A loss is clearly above a level if it exceeds it by this factor."""

FIRST_STEPS = 5
"""The initial loss is the median of this many steps."""

UNUSUAL = (*RISING, "fall")

SCALARS = ("start", "best", "calm", "quiet")
"""Attributes of the detector that are single numbers, as the state names them."""


class Step(NamedTuple):
    """A step compared with the history.

    Attributes:
        value, norm: logarithms of the loss and of the gradient norm.
        found: the step's statistics; empty while the history is too short for them.
        unusual: why the step is unusual; empty if it is ordinary.
        ratio: the most unusual statistic divided by its limit.
    """

    value: float
    norm: float
    found: dict[str, float]
    unusual: str
    ratio: float = 0.0


class Verdict(NamedTuple):
    """The detector's verdict on a step.

    Attributes:
        state: "healthy"; "suspected" while blocks and commits should be held back; "diverged" if the run should go back.
        reason: one line for the user; empty if the step is healthy and nothing was decided.
        since: how many steps ago the suspicion began; 0 means at this step.
        accepted: True only at the step at which a suspected level is accepted as the new normal one.
    """

    state: Literal["healthy", "suspected", "diverged"]
    reason: str = ""
    since: int = 0
    accepted: bool = False


class Detector:
    """Judges each step of a run. The caller decides what to do about the verdict.

    Args:
        window: number of healthy steps from which the tails of the loss are learned.
        threshold: if the steps' scatter is independent, a step is suspected above this many robust standard deviations.
    """

    def __init__(self, window: int, threshold: float):
        self.history = History(window, threshold)
        self.suspicious: list[Step] = []  # all steps since the suspicion began, the ordinary ones among them too
        self.left_levels: list[tuple[int, list[float]]] = []  # former levels: steps until each is forgotten, its log losses
        self.first_losses: list[float] = []
        self.start = 0.0  # the initial loss
        self.best = math.inf  # the lowest level of LONG steps so far
        self.calm = 0  # ordinary steps in a row within the suspicion
        self.quiet = 0  # steps left for which only a value that is not finite counts

    def cool_down(self, steps: int) -> None:
        """Tell the detector that the run went back: for ``steps`` steps only a value that is not finite counts.

        The caller chooses ``steps`` so that the spike's own step is over by then. The history stays as it was before the spike,
        since the run is back where it was.
        """
        self.quiet = steps
        self._end_suspicion()

    def accept(self) -> None:
        """Take the present level as the normal one: the caller has used up its attempts to go back and continues."""
        if self.suspicious:
            values = self._since_the_last_fall(self.history.limits()["fall"])
            self.start = max(self.start, GROWTH_FACTOR * self._loss(statistics.median(values[-max(TRENDS) :])))
            self._move(values)

    def check(self, loss: float, grad_norm: float) -> Verdict:
        """The verdict on one step. After "diverged" the caller must call ``cool_down`` or ``accept``."""
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            return Verdict("diverged", f"loss {loss}, gradient norm {grad_norm}", len(self.suspicious))
        if len(self.first_losses) < FIRST_STEPS:
            self.first_losses.append(loss)
            self.start = statistics.median(self.first_losses)
        self.left_levels = [(steps - 1, losses) for steps, losses in self.left_levels if steps > 1]
        step = self._assess(loss, math.log(max(grad_norm, 1e-30)))
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
            self._learn_false_alarm()
            return Verdict("healthy")
        return self._judge(f"{self._reason()} (loss {loss:.4g}, gradient norm {grad_norm:.4g})")

    def _assess(self, loss: float, norm: float) -> Step:
        """Compare a step with the history."""
        value = math.log(max(loss, 0.0) + self._negligible())
        if len(self.history.losses) < MIN_SAMPLES:
            high = loss > GROWTH_FACTOR * self.start + self._negligible()
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
        high = self._loss(statistics.median([*self.history.losses, *newest][-SHORT:])) > self._untrained_loss()
        return Step(value, norm, found, f"loss as high as at the start ({self.start:.4g})" if high else "", ratio)

    def _judge(self, reason: str) -> Verdict:
        """The verdict on a suspicion: it continues, is proved, or ends because its level is accepted."""
        steps, since = len(self.suspicious), len(self.suspicious) - 1
        limits, before = self.history.limits(), self._loss_before()
        values = self._since_the_last_fall(limits["fall"])
        trends = {count: trend(values, count) for count in TRENDS if len(values) >= 2 * count}
        growing = {count for count, rise in trends.items() if rise > limits[f"trend of {count}"]}
        explained = max(min(GROWTH_FACTOR * before, max(self.start, CLEARLY_ABOVE * before)), 4 * self._negligible())
        level = max((self._loss(statistics.median(values[-count:])) for count in growing), default=0.0)
        if level > explained:
            return Verdict("diverged", f"the loss grew from {before:.4g} to {level:.4g} and still grows: {reason}", since)
        longest = max(TRENDS)
        if steps < PATIENCE or (longest not in trends and steps < LIMIT):
            return Verdict("suspected", reason, since)
        level = self._loss(statistics.median(values[-longest:]))
        slope, usual = trends.get(longest, 0.0), limits[f"trend of {longest}"]
        high = longest in trends and level > max(before, self._untrained_loss())
        if high and (slope > -0.5 * usual or level > 2 * self._untrained_loss() or steps >= LIMIT):
            start = f"as high as at the start ({self.start:.4g})"
            return Verdict("diverged", f"the loss stays at {level:.4g}, {start}: {reason}", since)
        if high or (slope > 0.5 * usual and steps < LIMIT):
            return Verdict("suspected", reason, since)
        if slope > 0.5 * usual and trend(values, len(values) // 2) > usual:
            grown = f"the loss has grown for {steps} steps, from {before:.4g} to {level:.4g}"
            return Verdict("diverged", f"{grown}: {reason}", since)
        self._move(values)
        reason = f"a loss of {level:.4g} is accepted as the new level, {before:.4g} was the old one"
        return Verdict("healthy", reason, since, accepted=True)

    def _since_the_last_fall(self, limit: float) -> list[float]:
        """The log losses of the suspicion, from the last one that was too low on: to come back from there is not growth."""
        low = [step.found.get("fall", 0.0) > limit for step in self.suspicious]
        first = 0 if low[-1] or True not in low else len(low) - low[::-1].index(True)
        return [step.value for step in self.suspicious[first:]]

    def _loss_before(self) -> float:
        """The level of the loss before the suspicion."""
        if len(self.history.losses) < MIN_SAMPLES:
            return self.start
        return self._loss(min(self.history.level(), self.history.level(LONG)))

    def _untrained_loss(self) -> float:
        """The loss above which the model is no better than at the start or, if it has learned little, far above its best."""
        best = min(self.best, self._loss_before())
        return UNTRAINED_SHARE * self.start if best < LEARNED_SHARE * self.start else GROWTH_FACTOR * best

    def _reason(self) -> str:
        return next(step.unusual for step in reversed(self.suspicious) if step.unusual)

    def _negligible(self) -> float:
        return NEGLIGIBLE * abs(statistics.median(self.first_losses)) + 1e-12

    def _loss(self, value: float) -> float:
        return math.exp(value) - self._negligible()

    def _is_back(self, step: Step) -> bool:
        """Whether the loss has returned to a former level. If so, that becomes the level again and the suspicion ends."""
        usual = self.history.limits()["one step"]
        for index, (_, losses) in enumerate(self.left_levels):
            level = statistics.median(losses[-LONG:])
            apart = abs(level - self.history.level()) > usual
            # A former level as high as an untrained model's is no excuse.
            if apart and abs(step.value - level) < usual and self._loss(level) < self._untrained_loss():
                del self.left_levels[index]
                self._remember_level()
                self.history.move(losses, [])
                self._end_suspicion()
                return True
        return False

    def _remember_level(self) -> None:
        self.left_levels = [*self.left_levels[-2:], (MEMORY, list(self.history.losses))]

    def _is_mild(self) -> bool:
        return max(step.ratio for step in self.suspicious) < MILD_FACTOR

    def _move(self, values: list[float]) -> None:
        """Take the level of these log losses as the normal one, and end the suspicion."""
        for step in self.suspicious if self._is_mild() else []:
            self.history.learn_unusual(step.found)
        if self.history.losses:
            self._remember_level()
        self.history.move(values, [step.norm for step in self.suspicious][-len(values) :])
        self._end_suspicion()

    def _learn(self, step: Step) -> None:
        self.history.learn(step.value, step.norm, step.found)
        if len(self.history.losses) >= LONG:
            self.best = min(self.best, self._loss(self.history.level(LONG)))

    def _learn_false_alarm(self) -> None:
        """Learn from a suspicion that passed by itself: a short or mild one was this run's noise, any other was an event."""
        noise = len(self.suspicious) <= SHORT or self._is_mild()
        for step in self.suspicious:
            if not step.unusual:
                self._learn(step)
            elif noise:
                self.history.learn_unusual(step.found)
        self._end_suspicion()

    def _end_suspicion(self) -> None:
        self.suspicious, self.calm = [], 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers, lists and names. After ``load_state_dict`` all later verdicts are bitwise the same."""
        scalars = {name: getattr(self, name) for name in SCALARS}
        return scalars | {
            "history": self.history.state_dict(),
            "suspicious": [tuple(step) for step in self.suspicious],
            "left": [(steps, list(losses)) for steps, losses in self.left_levels],
            "first": list(self.first_losses),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in SCALARS:
            setattr(self, name, state[name])
        self.history.load_state_dict(state["history"])
        self.suspicious = [Step(*step) for step in state["suspicious"]]
        self.left_levels = [(steps, list(losses)) for steps, losses in state["left"]]
        self.first_losses = list(state["first"])
