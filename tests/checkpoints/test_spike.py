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
    detector = Detector(128, 8.0)
    assert [reason for loss, norm in clean(2000, seed) if (reason := detector.check(loss, norm))] == []


@pytest.mark.parametrize(
    ("loss", "norm", "words"),
    [
        (math.nan, 1.0, "nan"),
        (3.0, math.inf, "inf"),
        (9.0, 0.4, "loss"),
        (2.5, 400.0, "gradient norm"),
    ],
)
def test_a_spike_is_one_at_once_and_stays_out_of_the_statistics(loss: float, norm: float, words: str) -> None:
    detector = Detector(128, 8.0)
    samples = clean(400, 0)
    for sample in samples[:200]:
        assert detector.check(*sample) is None
    for _ in range(300):  # longer than the window: it is still a spike
        assert words in str(detector.check(loss, norm))
    assert detector.check(*samples[200]) is None


def test_quiet_after_a_roll_back_but_not_for_nan() -> None:
    detector = Detector(32, 6.0)
    for sample in clean(100, 1):
        detector.check(*sample)
    detector.reset(quiet=20)
    assert detector.check(9.0, 1.0) is None
    assert "nan" in str(detector.check(math.nan, 1.0))


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
