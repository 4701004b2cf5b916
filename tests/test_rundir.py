"""The run directory: what it holds, whose it is, and that it appears whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distmerge import config_file
from distmerge.config import TrainConfig
from distmerge.rundir import Lock, RunDirectory, UserError, write_atomically


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return config_file.validate({"run_dir": str(tmp_path), "model": {"config": {"model_type": "llama"}}})


def test_begin_writes_what_the_run_is(tmp_path: Path, config: TrainConfig) -> None:
    run = RunDirectory(tmp_path)
    run.check(config)
    run.begin(config, ["distmerge", "train"])
    assert config_file.read(str(run.config), []) == config
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["command"] == ["distmerge", "train"]
    assert environment["python"] == sys.version.split()[0]
    run.check(config)


def test_final_is_replaced_whole(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    for content in ("old", "new"):
        (tmp_path / ".final").mkdir()
        (tmp_path / ".final" / "model").write_text(content)
        run.publish_final(tmp_path / ".final")
    assert (run.final / "model").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


def test_finished_needs_the_model_and_the_steps(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.finished(10) is None
    run.summary.write_text(json.dumps({"steps": 10}))
    assert run.finished(10) is None
    run.final.mkdir()
    assert run.finished(10) == {"steps": 10}
    assert run.finished(11) is None


def test_atomic_writes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "one")
    write_atomically(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


JOIN = """
import sys
from distmerge.rundir import Lock, RunDirectory
lock = Lock(RunDirectory(sys.argv[1]))
lock.join(int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("rank", [0, 1, 7])
def test_any_rank_that_lives_keeps_the_directory(tmp_path: Path, rank: int) -> None:
    """The launcher and rank 0 may be dead: one orphan that could go on writing is one too many."""
    holder = subprocess.Popen(
        [sys.executable, "-c", JOIN, str(tmp_path), str(rank)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        lock = Lock(RunDirectory(tmp_path))
        with pytest.raises(UserError, match="is in use by"):
            lock.take_job(patience_seconds=0.1)
    finally:
        holder.kill()
        holder.wait()
    lock.take_job(patience_seconds=600)
    assert "process " in (tmp_path / "lock").read_text()
    lock.release()
