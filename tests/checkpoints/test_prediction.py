"""Which annealed forks correct a prediction, and by how much."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distmerge.windows.prediction import corrected, corrections

FORK: dict[str, Any] = {"from": 800, "decay_steps": 200, "curve": "linear"}


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({}, True),
        ({"from": 720, "decay_steps": 185}, True),  # ends at 905
        ({"from": 690, "decay_steps": 200}, False),  # ends at 890
        ({"from": 1000, "decay_steps": 200}, False),
        ({"decay_steps": 175}, False),
        ({"curve": "cosine"}, False),
        ({"outcome": None}, False),
        ({"merged": None}, False),
    ],
)
def test_only_forks_nearby_count(changes: dict[str, Any], counts: bool) -> None:
    known = FORK | {"merged": 2.02, "outcome": 2.0} | changes
    assert bool(corrections(FORK, [known])) == counts


def test_a_line_without_an_outcome_corrects_nothing() -> None:
    assert corrections(FORK, [FORK | {"merged": 2.0}]) == []


def test_the_bias_that_all_have_is_taken_out() -> None:
    known = [FORK | {"merged": outcome * 1.02, "outcome": outcome} for outcome in (1.9, 2.0, 2.2)]
    assert corrected(3.06, corrections(FORK, known)) == pytest.approx(3.0, rel=1e-3)
    assert corrected(3.06, []) == 3.06


@pytest.mark.parametrize(
    ("ratios", "taken_out"),
    [
        ([0.01], 0.75 * 0.01),  # one fork: 1 - (0.5 / 1)^2
        ([0.01] * 4, 0.9375 * 0.01),
        ([-0.004], 0.0),  # less than the scatter
        ([-0.02, 0.04], 0.0),  # they disagree
        ([0.0, 0.0], 0.0),
        ([-0.01, -0.03], -0.02 * (1 - 2e-4 / (2 * 4e-4))),
    ],
)
def test_a_bias_is_taken_out_as_far_as_scatter_does_not_explain_it(ratios: list[float], taken_out: float) -> None:
    assert math.log(2.0 / corrected(2.0, ratios)) == pytest.approx(taken_out, abs=1e-12)
