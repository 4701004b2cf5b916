"""The detector on synthetic losses: what is suspected and how soon, what is a divergence, and what a healthy run may do.

The families are those of benchmarks/detector.py, at a small size and on seeds of their own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable

import pytest

from distmerge.config.checkpoints import RecoverySettings
from distmerge.recovery.detector import LIMIT, PATIENCE, Detector, Verdict

START, END = 5.5, 2.0

BASE = 2.0 + 3.5 * math.exp(-4)
"""The level after the 600 steps of ``trained``."""


def detector() -> Detector:
    return Detector(RecoverySettings().window, RecoverySettings().threshold)


def level(step: int) -> float:
    return END + (START - END) * math.exp(-step / 150)


def norm(generator: random.Random) -> float:
    return math.exp(generator.gauss(-1, 0.25))


def watch(watching: Detector, losses: Iterable[float], norms: float = 0.4) -> list[Verdict]:
    """All verdicts; after a divergence the caller accepts, as one whose attempts are used up."""
    verdicts = []
    for loss in losses:
        verdicts.append(watching.check(loss, norms))
        if verdicts[-1].state == "diverged":
            watching.accept()
    return verdicts


def noisy(levels: Iterable[float], seed: int, scatter: float = 0.02) -> list[float]:
    generator = random.Random(seed)
    return [value * (1 + generator.gauss(0, scatter)) for value in levels]


def trained(seed: int = 0) -> Detector:
    """After 600 healthy steps, the last ones at BASE with 2% of noise."""
    watching = detector()
    assert {verdict.state for verdict in watch(watching, noisy(map(level, range(600)), seed))[50:]} == {"healthy"}
    return watching


def delay(verdicts: list[Verdict], states: tuple[str, ...] = ("suspected", "diverged")) -> int:
    """Steps until the first verdict of these, 1 for the first step."""
    return next(step for step, verdict in enumerate(verdicts, 1) if verdict.state in states)


# ---- healthy families


def plain(step: int, generator: random.Random) -> float:
    return level(step) * (1 + generator.gauss(0, 0.02))


def rare_domain(step: int, generator: random.Random) -> float:
    return plain(step, generator) * (1.6 if generator.random() < 0.1 else 1)


def doubled(step: int, generator: random.Random) -> float:
    return plain(step, generator) * (2 if generator.random() < 0.02 else 1)


def near_zero(step: int, generator: random.Random) -> float:
    return (0.002 + 5 * math.exp(-step / 80)) * math.exp(generator.gauss(0, 0.5)) * (10 if generator.random() < 0.01 else 1)


def epochs(step: int, generator: random.Random) -> float:
    return plain(step, generator) * (1 + 0.2 * (step % 120) / 120)


def heavy_tails(step: int, generator: random.Random) -> float:
    student = generator.gauss(0, 1) / math.sqrt(generator.expovariate(1.0))
    return level(step) * (1 + max(-0.5, 0.02 * student))


def batch_of_one(step: int, generator: random.Random) -> float:
    document = math.exp(random.Random(step // 4).gauss(0, 0.3))
    return level(step) * document * (1 + generator.gauss(0, 0.15))


def switch(step: int, generator: random.Random) -> float:
    """Shakespeare, then Wikipedia: 1.6 times the loss, which falls."""
    past = step - 500
    return plain(step, generator) * (1 if past < 0 else 1 + 0.6 * (0.4 + 0.6 * math.exp(-past / 150)))


def mixed_in(step: int, generator: random.Random) -> float:
    return plain(step, generator) * (1 + 0.3 * min(1.0, max(0, step - 500) / 100))


def spikes(step: int, generator: random.Random) -> float:
    return plain(step, generator) * (1 + 0.8 * math.exp(-(step % 300) / 5) * (step > 300))


FAMILIES = (plain, rare_domain, doubled, near_zero, epochs, heavy_tails, batch_of_one, switch, mixed_in, spikes)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_a_healthy_run_is_never_called_diverged(family: Callable[[int, random.Random], float]) -> None:
    for seed in range(2):
        generator = random.Random(seed)
        verdicts = watch(detector(), [family(step, generator) for step in range(1500)])
        assert [verdict.reason for verdict in verdicts if verdict.state == "diverged"] == []
        suspected = sum(verdict.state == "suspected" for verdict in verdicts) / len(verdicts)
        assert suspected < (0.15 if family is mixed_in else 0.1), suspected
        assert max(verdict.since for verdict in verdicts) < LIMIT


def test_correlated_losses_are_healthy() -> None:
    generator, noise, losses = random.Random(4), 0.0, []
    for step in range(2000):
        noise = 0.9 * noise + generator.gauss(0, 0.02)
        losses.append(level(step) * (1 + noise))
    verdicts = watch(detector(), losses)
    assert not any(verdict.state == "diverged" for verdict in verdicts)
    assert sum(verdict.state == "suspected" for verdict in verdicts) < 200


def test_bursts_of_the_gradient_norm_with_a_calm_loss_are_healthy() -> None:
    generator, watching = random.Random(2), detector()
    for step in range(1000):
        burst = 300.0 if step % 150 < 10 else 1.0
        assert watching.check(plain(step, generator), norm(generator) * burst).state != "diverged"


# ---- delays


@pytest.mark.parametrize(
    ("after", "limit"),
    [
        ([1.1] * 20, 4),
        ([1.5] * 5, 1),
        ([1 + 0.5 * math.exp(-step / 5) for step in range(20)], 1),
        ([1 + 0.25 * math.exp(-step / 5) for step in range(20)], 2),
        ([1 + 0.003 * step for step in range(1, 80)], 60),
        ([0.02 + 0.98 * math.exp(-step / 3) for step in range(30)], 5),
    ],
    ids=["a step of 10%", "a step of 50%", "a spike of 50%", "a spike of 25%", "a ramp of .3%", "constant batches"],
)
def test_a_fault_is_suspected_soon(after: list[float], limit: int) -> None:
    for seed in range(5):
        assert delay(watch(trained(seed), noisy([BASE * factor for factor in after], 100 + seed))) <= limit


def test_a_gradient_norm_that_rises_with_the_loss_is_suspected_sooner() -> None:
    """As with a learning rate of ten times: a loss 3 deviations higher, at four times the gradient norm."""
    delays = {}
    for factor in (1.0, 4.0):
        watching, generator = detector(), random.Random(3)
        for step in range(600):
            watching.check(plain(step, generator), norm(generator))
        losses = noisy([BASE * 1.06] * 30, 4)
        delays[factor] = delay([watching.check(loss, factor * norm(generator)) for loss in losses])
    assert delays[4.0] <= 4 < delays[1.0]


def test_a_falling_loss_does_not_blind() -> None:
    """As early in training: the loss falls by more than the spike rises."""
    watching, generator = detector(), random.Random(0)
    falling = [5 - 2.5 * step / 150 + generator.gauss(0, 0.1) for step in range(150)]
    assert {verdict.state for verdict in watch(watching, falling)} == {"healthy"}
    assert delay(watch(watching, [3.4] * 4)) <= 4


# ---- what a suspicion ends in


@pytest.mark.parametrize(
    ("loss", "grad_norm", "words"), [(math.nan, 1.0, "nan"), (3.0, math.inf, "inf"), (-math.inf, 1.0, "inf")]
)
def test_what_is_not_finite_is_a_divergence_at_once_and_leaves_no_trace(loss: float, grad_norm: float, words: str) -> None:
    watching, other = trained(), trained()
    assert detector().check(loss, grad_norm).state == "diverged"  # the very first step, too
    for _ in range(300):
        verdict = watching.check(loss, grad_norm)
        assert verdict.state == "diverged" and words in verdict.reason and verdict.since == 0
    assert watching.state_dict() == other.state_dict()


@pytest.mark.parametrize(
    ("after", "limit"),
    [
        (lambda step: BASE * 1.05**step, 20),
        (lambda step: BASE * (1 + 0.01 * step), 70),
        (lambda step: min(START * 1.1, BASE + step), PATIENCE),  # climbs to the start's loss and stays
        (lambda step: START, PATIENCE),
        (lambda step: START * (1 + 20 * math.exp(-step / 200)), PATIENCE),  # falls from far above it
        (lambda step: BASE * 1.003**step, 250),
    ],
    ids=["grows by 5%", "grows by 1% of the level", "collapses", "untrained", "explodes", "creeps"],
)
def test_a_divergence_is_called_so(after: Callable[[int], float], limit: int) -> None:
    for seed in range(3):
        watching, losses = trained(seed), noisy(map(after, range(limit)), 50 + seed)
        verdicts: list[Verdict] = []
        while not verdicts or verdicts[-1].state != "diverged":
            verdicts.append(watching.check(losses[len(verdicts)], 0.4))
        assert verdicts[-1].since >= 5 and "\n" not in verdicts[-1].reason


def test_a_run_that_diverges_from_its_first_steps_is_called_so() -> None:
    verdicts = watch(detector(), noisy([5.5, 5.5, 5.5, 5.6, 5.8, *(5.5 * 1.3**step for step in range(12)), *[80.0] * 60], 0))
    assert any(verdict.state == "diverged" for verdict in verdicts)


@pytest.mark.parametrize("shape", [lambda step: 1.5, lambda step: 1.2 + 0.4 * math.exp(-step / 60)], ids=["flat", "falling"])
def test_a_level_that_stays_or_falls_is_accepted_once(shape: Callable[[int], float]) -> None:
    watching = trained()
    verdicts = watch(watching, noisy([BASE * shape(step) for step in range(300)], 7))
    accepted = [step for step, verdict in enumerate(verdicts) if verdict.accepted]
    assert len(accepted) == 1 and accepted[0] <= PATIENCE + 4
    verdict = verdicts[accepted[0]]
    assert verdict.state == "healthy" and "new level" in verdict.reason and verdict.since >= PATIENCE - 1
    assert all(verdict.state == "healthy" for verdict in verdicts[accepted[0] :])
    # and the new level is held against what comes
    assert delay(watch(watching, [BASE * shape(300) * 1.5])) == 1


def test_batches_that_are_too_easy_are_suspected_and_the_good_data_after_them_is_not() -> None:
    for length in (30, 100):  # shorter and longer than a level needs to be accepted
        watching = trained()
        verdicts = watch(watching, noisy([BASE * (0.02 + 0.98 * math.exp(-step / 3)) for step in range(length)], 1))
        assert delay(verdicts) <= 5 and not any(verdict.state == "diverged" for verdict in verdicts)
        assert (length > PATIENCE) == any(verdict.accepted for verdict in verdicts)
        back = watch(watching, noisy([BASE] * 200, 2))
        assert all(verdict.state == "healthy" for verdict in back[4:])
        assert not any("too high" in verdict.reason for verdict in back)


def test_going_back_and_forth_between_two_domains_is_learned() -> None:
    watching = trained()
    losses = noisy([BASE * (1.8 if step // 100 % 2 == 0 else 1) for step in range(600)], 3)
    verdicts = watch(watching, losses)
    assert not any(verdict.state == "diverged" for verdict in verdicts)
    assert sum(verdict.state == "suspected" for verdict in verdicts) < 60  # the first time only


def test_one_hard_batch_is_suspected_for_some_steps_and_then_known() -> None:
    watching = trained()
    hard = [2.0 if step % 50 == 0 else 1.0 for step in range(500)]
    verdicts = watch(watching, noisy([BASE * factor for factor in hard], 5))
    starts = [step for step, verdict in enumerate(verdicts) if verdict.state == "suspected" and verdict.since == 0]
    assert 1 <= len(starts) <= 3
    assert sum(verdict.state == "suspected" for verdict in verdicts) <= 8 * len(starts)


def test_quiet_after_a_roll_back_but_not_for_nan_and_what_was_known_stays() -> None:
    watching = trained()
    watch(watching, [9.0] * 10)
    watching.cool_down(20)
    assert watching.check(9.0, 1.0).state == "healthy"
    assert watching.check(math.nan, 1.0).state == "diverged"
    assert {verdict.state for verdict in watch(watching, noisy([BASE] * 20, 6))} == {"healthy"}
    assert watching.check(9.0, 1.0).state == "suspected"  # the spike's own level was not learned


def test_an_accepted_divergence_is_the_level_from_then_on() -> None:
    watching = trained()
    verdicts = [watching.check(loss, 0.4) for loss in noisy([START] * PATIENCE, 8)]
    assert verdicts[-1].state == "diverged" and verdicts[-1].since == PATIENCE - 1
    assert watching.check(START, 0.4).state == "diverged"  # until the caller has said what it does
    watching.accept()
    assert {verdict.state for verdict in watch(watching, noisy([START] * 500, 9))} == {"healthy"}


@pytest.mark.parametrize("at", [3, 200, 603, 620, 700])
def test_the_state_goes_on_bitwise(at: int) -> None:
    losses = noisy(map(level, range(600)), 2) + noisy([BASE * 1.4] * 100, 3) + noisy([BASE] * 60, 4) + [math.nan, 9.0]
    generator = random.Random(5)
    steps = [(loss, norm(generator)) for loss in losses]
    whole, first, second = detector(), detector(), detector()
    wanted = [whole.check(*step) for step in steps]
    found = [first.check(*step) for step in steps[:at]]
    second.load_state_dict(first.state_dict())
    found += [second.check(*step) for step in steps[at:]]
    assert found == wanted
    assert second.state_dict() == whole.state_dict()
