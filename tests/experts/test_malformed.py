"""Malformed inputs give one line, cost little, and publish nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_malformed_inputs(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "tests.experts.malformed", str(tmp_path)],
        capture_output=True, text=True, check=True, timeout=1200, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) >= 50
    for name, result in found.items():
        assert result["status"] == 2, (name, result)
        assert result["said"].startswith("error: ") and result["said"].count("\n") == 1, (name, result["said"])
        assert len(result["said"]) < 700, (name, result["said"])
        assert result["bytes"] < 200e6, (name, result["bytes"])
        assert not result["published"], name
    assert not Path("pwned").exists()
