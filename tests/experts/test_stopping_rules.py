"""Stopping rules on scripted curves: peaks, plateaus, noise, ties."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from distmerge.config import toml
from distmerge.config.experts import Stopping
from distmerge.experts.stopping import Peak, Plateau


def plateau(losses: list[float], **keys: Any) -> tuple[int | None, list[float]]:
    """Where the rule stops, counted from 0, and the rates on the way."""
    rule = Plateau(Stopping(rule="plateau", **keys))
    rates: list[float] = []
    for index, loss in enumerate(losses):
        stops = rule.observe(loss)
        rates.append(rule.lr_factor)
        if stops:
            return index, rates
    return None, rates


@pytest.mark.parametrize(
    ("losses", "keys", "stop", "rates"),
    [
        ([3, 2, 1, 0.5], {}, None, [1, 1, 1, 1]),  # it falls and falls
        ([3, 2, 2, 1, 1, 0.9], {}, 4, [1, 1, 0.5, 0.5, 0.5]),  # a plateau, progress at the lower rate, the next plateau
        ([3, 2, 2, 2], {"reductions": 0}, 2, [1, 1, 1]),
        ([3, 2, 2.1, 1.9, 2.1, 1.8], {"patience": 2}, None, [1, 1, 1, 1, 1, 1]),  # noise that patience outlasts
        ([3, 2, 2.1, 2.2, 2.3, 2.4], {"patience": 2}, 5, [1, 1, 1, 0.5, 0.5, 0.5]),
        ([2, 2, 2], {}, 2, [1, 0.5, 0.5]),  # ties are no improvement
        ([2, 1.99, 1.98], {"tolerance": 0.1}, 2, [1, 0.5, 0.5]),  # too little is none either
        ([2, math.nan, 1.5, math.inf], {}, 3, [1, 0.5, 0.5, 0.5]),
        ([1, 2, 3, 4, 5], {"reductions": 3, "factor": 0.1}, 4, [1, 0.1, 0.01, 0.001, 0.001]),
    ],
)
def test_plateau(losses: list[float], keys: dict, stop: int | None, rates: list[float]) -> None:
    stopped, found = plateau(losses, **keys)
    assert stopped == stop
    assert found == pytest.approx(rates)


def peak(losses: list[float], **keys: Any) -> tuple[int | None, int]:
    """Where the rule stops, at steps 1, 2, 4, ..., and the step that it keeps."""
    rule = Peak(Stopping.model_validate({"rule": "merged", "merge_with": ["x"]} | keys))
    for index, loss in enumerate(losses):
        if rule.observe(1 << index, loss):
            return 1 << index, rule.best_step
    return None, rule.best_step


@pytest.mark.parametrize(
    ("losses", "keys", "expected"),
    [
        ([4, 3, 2, 1], {}, (None, 8)),
        ([4, 3, 3.5, 1], {"patience": 1}, (4, 2)),  # a peak of the score
        ([4, 3, 3.5, 2.9, 3, 3], {}, (32, 8)),  # one bad look is forgiven
        ([3, 3, 3], {}, (4, 1)),  # of equal ones the first
        ([3, 2.99, 2.98], {"tolerance": 0.05}, (4, 1)),
        ([math.nan, 3, math.nan, 2], {}, (None, 8)),
        ([math.nan, math.nan], {}, (2, 0)),
    ],
)
def test_peak(losses: list[float], keys: dict, expected: tuple) -> None:
    assert peak(losses, after=1, **keys) == expected


NOISE = [2.300, 2.297, 2.303, 2.301]
"""Merges at steps 1, 2, 4 and 8, when a rate that warms up has moved nothing yet."""


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        ([2.299, 2.1, 1.6, 1.5, 1.9, 3.0], (512, 128)),  # the peak of the merge, not the lucky look at step 2
        ([2.31, 2.32, 2.0, 1.8], (None, 128)),  # a bad look more, at a step that counts
        ([2.31, 2.32, 2.33], (64, 16)),  # training that only ever hurts the merge ends soon
        ([2.299, 2.1, 1.6], (None, 64)),
    ],
)
def test_early_noise_ends_nothing(later: list[float], expected: tuple) -> None:
    assert peak([*NOISE, *later]) == expected
    assert peak([2.0, 2.5, 2.0, 2.5, *later]) == expected  # a bump that lasts
    assert Stopping(rule="plateau").patience == 1  # the other rule is quick


def test_a_training_in_which_no_look_counts_is_refused() -> None:
    table = {"run_dir": "x", "model": {"path": "x"}, "expert": {"skill": "own"}, "checkpoint": {"at": "powers-of-two"}}
    table["stopping"] = {"rule": "merged", "merge_with": ["y"]}
    with pytest.raises(ValueError, match=r"stopping\.after must be <= steps = 8, or no evaluation counts, got 16"):
        toml.validate(table | {"steps": 8})


def test_rules_go_on_from_their_state() -> None:
    curve = [3, 2, 2.1, 1.9, 2, 2.5, 2.4]
    for cut in range(len(curve)):
        whole, first = (Plateau(Stopping(rule="plateau", reductions=2)) for _ in range(2))
        wanted = [whole.observe(loss) for loss in curve]
        found = [first.observe(loss) for loss in curve[:cut]]
        second = Plateau(Stopping(rule="plateau", reductions=2))
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert found + [second.observe(loss) for loss in curve[cut:]] == wanted
        assert second.state_dict() == whole.state_dict()
