"""The detector on synthetic losses: what is a spike, what is not, and what must not blind it."""

from __future__ import annotations

import math
import random

import pytest

from distmerge.checkpoints.plan import batch_index, skip_around
from distmerge.checkpoints.spike import Detector


def clean(steps: int, seed: int) -> list[tuple[float, float]]:
    """A loss that falls and a gradient norm that scatters, as in training."""
    generator = random.Random(seed)
    return [
        (2 + 3 * math.exp(-step / 200) + generator.gauss(0, 0.05), math.exp(generator.gauss(-1, 0.25)))
        for step in range(steps)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
def test_no_false_alarm(seed: int) -> None:
    detector = Detector(128, 6.5)
    assert [reason for loss, norm in clean(2000, seed) if (reason := detector.check(loss, norm))] == []


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "nan"),
        (3.0, math.inf, "inf"),
        (9.0, 0.4, "loss"),
        (9.0, 4000.0, "gradient norm"),
    ],
)
def test_a_spike_is_one_at_once_and_stays_out_of_the_statistics(loss: float, norm: float, words: str) -> None:
    detector = Detector(128, 6.5)
    samples = clean(400, 0)
    for sample in samples[:200]:
        assert detector.check(*sample) is None
    for _ in range(300):  # longer than the window: it is still a spike
        assert words in str(detector.check(loss, norm))
    assert detector.check(*samples[200]) is None


def test_a_creeping_divergence_is_found_and_one_hard_batch_is_none() -> None:
    detector = Detector(128, 6.5)
    samples = clean(400, 3)
    for sample in samples[:200]:
        assert detector.check(*sample) is None
    loss, norm = samples[200]
    assert detector.check(loss + 0.5, norm * 8) is None  # 10 sigma, once
    for sample in samples[201:210]:
        assert detector.check(*sample) is None
    creeping = [detector.check(loss + 0.05 * step, norm) for step, (loss, norm) in enumerate(samples[210:220])]
    assert 3 <= next(step for step, reason in enumerate(creeping) if reason) <= 8  # by 8 sigma
    higher = Detector(128, 6.5)
    for sample in samples[:200]:
        higher.check(*sample)
    sudden = [higher.check(loss + 0.3, norm) for loss, norm in samples[200:206]]  # 6 sigma, and it stays
    assert "loss" in str(next(reason for reason in sudden[:5] if reason))


def test_a_gradient_norm_that_passes_is_none_and_one_that_stays_is() -> None:
    """Its tail is heavy in well runs: one batch of a thousand times the norm must not look like a divergence of four steps."""
    detector = Detector(128, 6.5)
    samples = clean(400, 5)
    for index, (loss, norm) in enumerate(samples[:300]):
        assert detector.check(loss, norm * (1000 if index % 60 == 59 else 1)) is None
    staying = [detector.check(loss, norm * 1000) for loss, norm in samples[300:304]]
    assert staying[:2] == [None, None] and "gradient norm" in str(next(reason for reason in staying if reason))


def test_a_falling_loss_does_not_blind() -> None:
    """As early in training: the loss falls by more than the spike rises."""
    detector = Detector(128, 6.5)
    generator = random.Random(0)
    for step in range(150):
        assert detector.check(5 - 2.5 * step / 150 + generator.gauss(0, 0.1), 0.5) is None
    assert "loss" in str([detector.check(3.4, 0.5) for _ in range(4)])


def test_quiet_after_a_roll_back_but_not_for_nan() -> None:
    detector = Detector(32, 6.0)
    for sample in clean(100, 1):
        detector.check(*sample)
    detector.cool_down(20)
    assert detector.check(9.0, 1.0) is None
    assert "nan" in str(detector.check(math.nan, 1.0))
    for _ in range(20):
        detector.check(2.5, 0.4)
    assert "loss" in str(detector.check(9.0, 1.0))  # and then it sees again, by what it knew before


def test_state_survives() -> None:
    detector, other = Detector(64, 6.0), Detector(64, 6.0)
    samples = clean(300, 2)
    for sample in samples[:100]:
        detector.check(*sample)
    other.load_state_dict(detector.state_dict())
    assert [detector.check(*sample) for sample in [*samples[100:], (5.0, 90.0)]] == [
        other.check(*sample) for sample in [*samples[100:], (5.0, 90.0)]
    ]


def test_batches_are_left_out_once() -> None:
    assert skip_around(50, 10) == [(44, 10)]  # the batch of step 50 is number 49
    assert skip_around(3, 10) == [(0, 10)]
    assert skip_around(50, 0) == []
    assert [batch_index(step, [(3, 2)]) for step in range(5)] == [0, 1, 2, 5, 6]
    assert [batch_index(step, [(3, 2), (6, 10)]) for step in range(5)] == [0, 1, 2, 5, 16]
    assert [batch_index(step, [(6, 10), (3, 2)]) for step in range(5)] == [0, 1, 2, 5, 16]
