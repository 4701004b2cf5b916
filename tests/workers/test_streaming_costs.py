"""The benchmark of what streaming costs still runs; its full size is ``python benchmarks/streaming.py``."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_small_size_tells_costs_and_traffic(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/streaming.py"), "--small", "--seeds", "1", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    data = json.loads(done.stdout.splitlines()[-1])["data"]
    reference, preset = data["arms"]["DiLoCo"], data["arms"]["streaming preset"]
    assert reference["percent"] == 0 and math.isfinite(preset["percent"])
    assert preset["bytes_sent"] < 0.2 * reference["bytes_sent"]
    assert data["options"]["int4 without error feedback"]["standard_error"] is None  # one seed has none
    assert len(list((tmp_path / "streaming-small").glob("*-seed0-60.json"))) == 3  # kept, and not run again
