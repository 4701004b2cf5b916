"""Features that hold collectives meet in one run of two workers: every pair of them, with commits in a thread and without.

Two threads on one process group, or a collective that only some ranks take part in, end in a deadlock: such a run does not
end. The commits are as frequent as can be, so that a thread is at work whenever something else communicates.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints.runs import lines, parameters, same, write_text
from tests.checkpoints.test_workers import train_two
from tests.ranks import Ranks

STREAMING = {"kind": "diloco", "every": 6, "fragments": 1, "overlap": 2, "wire": "int4", "error_feedback": True}
DELAYED = {"kind": "sparta", "fraction": 0.05, "every": 2, "delay": 3}

FEATURES: dict[str, dict[str, Any]] = {
    "recovery": {"recovery": {"enabled": True, "margin": 2, "merge_last": 1}},
    "window": {"window": {"every": 6}},
    "preview": {"window": {"every": 6}, "preview": {"every": 6}},
    "overlap": {"merge": [STREAMING]},
    "delay": {"merge": [DELAYED]},
}
SETS = [*itertools.combinations(FEATURES, 2), tuple(FEATURES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    write_text(folder)
    return folder


def sections_of(features: tuple[str, ...], asynchronous: bool) -> dict[str, Any]:
    sections: dict[str, Any] = {
        "steps": 14,
        "checkpoint": {"every": 2, "keep": 2, "async": asynchronous},
        "evaluate": {"every": 6, "sequences": 8},
        "merge": [{"kind": "average", "every": 6}],
    }
    for feature in features:
        sections |= FEATURES[feature]
    if {"overlap", "delay"} <= set(features):
        sections["merge"] = [DELAYED, STREAMING]
    return sections


@pytest.mark.parametrize("features", SETS, ids="-".join)
def test_a_run_of_several_features_ends_and_a_thread_changes_no_bit(
    ranks: Ranks, folder: Path, features: tuple[str, ...]
) -> None:
    finals = []
    for asynchronous in (False, True):
        name = "-".join([*features, "async" if asynchronous else "sync"])
        ranks.run(2, train_two, folder, name, {}, sections_of(features, asynchronous), group=False, seconds=600)
        assert math.isfinite(lines(folder / name, "metrics.jsonl")[-1]["eval/loss"])
        finals.append(parameters(folder / name / "final"))
    assert same(*finals)
