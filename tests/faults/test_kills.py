"""Kills with all features on at once; ``benchmarks/kills.py`` is the same at full size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults.kills import campaign


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to find the ranks")
def test_a_run_with_everything_on_is_killed_four_times_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    result = campaign(tmp_path, kills=4, seed=4)
    assert result["differing"] == []
    assert len(result["kills"]) == 4
    assert len({entry["victim"] for entry in result["kills"]}) >= 2
