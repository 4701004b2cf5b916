from __future__ import annotations

import math

import numpy as np
import pytest

from distmerge import schedule
from distmerge.config.train import Schedule
from distmerge.rules.decay import DECAYS, Table, with_floor
from distmerge.windows.curves import factors, find_decay


@pytest.mark.parametrize("name", DECAYS)
def test_every_decay_goes_from_one_to_zero_and_never_increases(name: str) -> None:
    values = [DECAYS[name](i / 64) for i in range(65)]
    assert values[0] == 1 and abs(values[-1]) < 1e-15
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize("name", DECAYS)
def test_a_schedule_and_a_merge_of_a_window_follow_the_same_curve(name: str) -> None:
    wsd = Schedule.model_validate({"name": "wsd", "curve": name, "decay": 10})
    rates = [schedule.lr_factor(wsd, step, 30) for step in range(20, 30)]
    assert rates[1:] == factors(find_decay(name), np.array([i / 10 for i in range(10)]), "endpoint").tolist()


def test_a_floor_is_where_the_curve_ends() -> None:
    assert [with_floor(DECAYS["cosine"], 0.25)(x) for x in (0.0, 1.0)] == [1.0, 0.25]
    assert find_decay("floor:0.25")(1.0) == 0.25


def test_a_table_is_a_chain_of_straight_lines_that_stays_after_its_last_point() -> None:
    table = Table([(0, 1), (0.5, 0.2)])
    assert [table(x) for x in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1, 0.6, 0.2, 0.2])


@pytest.mark.parametrize("points", [[(0, 1)], [(0, 1), (0, 0.5)], [(0.1, 1), (1, 0)], [(0, 1), (1.5, 0)]])
def test_a_table_that_is_no_decay_is_refused(points: list[tuple[float, float]]) -> None:
    with pytest.raises(ValueError, match="table must"):
        Table(points)


def test_the_named_curves_are_the_formulas() -> None:
    assert DECAYS["linear"](0.3) == 0.7
    assert DECAYS["cosine"](0.3) == (1 + math.cos(math.pi * 0.3)) / 2
    assert DECAYS["1-sqrt"](0.3) == 1 - math.sqrt(0.3)
