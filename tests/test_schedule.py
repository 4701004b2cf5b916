"""Learning rates as functions of the step."""

from __future__ import annotations

import math

import pytest

from distmerge.config.train import Schedule
from distmerge.schedule import lr_factor


def factors(steps: int = 10, **keys) -> list[float]:
    return [lr_factor(Schedule(**keys), step, steps) for step in range(steps)]


def test_constant() -> None:
    assert factors() == [1.0] * 10
    assert factors(warmup=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_linear() -> None:
    assert factors(name="linear") == pytest.approx([1 - step / 10 for step in range(10)])
    assert factors(name="linear", warmup=5, floor=0.5)[5:] == pytest.approx([1.0, 0.9, 0.8, 0.7, 0.6])


def test_cosine() -> None:
    assert factors(name="cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 10)) for step in range(10)])
    assert factors(name="cosine", floor=0.2)[5] == pytest.approx(0.6)


def test_wsd_is_constant_and_then_falls() -> None:
    assert factors(name="wsd", warmup=2, decay=4) == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    assert factors(name="wsd", decay=10, floor=0.5) == pytest.approx([1 - step / 20 for step in range(10)])


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
def test_rates_are_positive_and_warmup_never_exceeds_the_peak(name: str, warmup: int) -> None:
    rates = factors(50, name=name, warmup=warmup, decay=10)
    assert all(0 < rate <= 1 for rate in rates)
    assert rates[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
