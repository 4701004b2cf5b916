"""Every malformed input is one line on standard error and status 2, and harms nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults.malformed import CASES
from tests.jobs import PATIENCE_SECONDS, distmerge

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What became of each case; all in one process, which forks a child a case."""
    run = subprocess.run(
        [sys.executable, "-m", "tests.faults.malformed", str(tmp_path_factory.mktemp("malformed"))],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=PATIENCE_SECONDS,
        cwd=Path(__file__).parents[2],
        env={key: value for key, value in os.environ.items() if key not in LAUNCHER},
    )
    return json.loads(run.stdout.splitlines()[-1])


def test_there_are_many_cases() -> None:
    assert len(CASES) >= 150
    for part in ("configuration", "environment", "data", "verbs", "models"):
        assert sum(name.startswith(part) for name in CASES) >= 20, part


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_input_is_one_line_and_harms_nothing(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    outcome = outcomes[name]
    assert outcome["status"] == 2, outcome
    assert outcome["said"].startswith("error: ") and outcome["said"].count("\n") == 1, outcome["said"]
    assert len(outcome["said"]) < 1500, outcome["said"]
    assert outcome["harmed"] == []
    assert not [path for path in outcome["made"] if path.startswith(("out", "run/final", "run/checkpoints"))]


@pytest.mark.parametrize(
    ("arguments", "environment"),
    [
        (["train", "nowhere.toml"], {}),
        (["train", "nowhere.toml"], {"RANK": "x", "WORLD_SIZE": "1"}),
        (["window", "nowhere", "--explain"], {}),
    ],
    ids=["configuration", "environment", "verb"],
)
def test_the_same_in_a_process_of_its_own(tmp_path: Path, arguments: list[str], environment: dict[str, str]) -> None:
    job = distmerge(arguments, tmp_path / "log", environment)
    assert job.wait() == 2, job.output
    assert job.output.startswith("error: ") and job.output.count("\n") == 1
