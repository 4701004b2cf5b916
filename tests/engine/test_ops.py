"""A killed compiler's lock file hangs nobody."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distmerge.engine.ops import one_builder, working_in

pytest.importorskip("deepspeed")


def test_a_stale_lock_file_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    (folder / "lock").touch()
    with one_builder(folder):
        assert not (folder / "lock").exists()


def test_a_compiler_at_work_is_waited_for(tmp_path: Path) -> None:
    folder = tmp_path / "cpu_adam"
    folder.mkdir()
    (folder / "lock").touch()
    with subprocess.Popen([sys.executable, "-c", "input()"], cwd=folder, stdin=subprocess.PIPE) as compiler:
        while not working_in(folder):
            pass
        assert compiler.stdin is not None
        waiting = subprocess.Popen(
            [sys.executable, "-c", f"from pathlib import Path; from distmerge.engine.ops import one_builder\n"
             f"with one_builder(Path({str(folder)!r})): print('in')"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(8)
        compiler.stdin.close()
    said, _ = waiting.communicate(timeout=1200)
    assert said == "in\n"
    assert not (folder / "lock").exists()
