"""The run directory: what it holds, whose it is, and that it appears whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distmerge.config import toml
from distmerge.config.train import TrainConfig
from distmerge.files import atomic
from distmerge.files.atomic import write_atomically
from distmerge.files.directories import publish_directory
from distmerge.rundir.layout import Lock, RunDirectory, UserError, begin_anew


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    return toml.validate({"run_dir": str(tmp_path), "model": {"config": {"model_type": "llama"}}})


def test_begin_writes_what_the_run_is(tmp_path: Path, config: TrainConfig) -> None:
    run = RunDirectory(tmp_path)
    run.check(config)
    run.begin(config, ["distmerge", "train"])
    assert toml.read(str(run.config), []) == config
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["command"] == ["distmerge", "train"]
    assert environment["python"] == sys.version.split()[0]
    run.check(config)


def publish_final(run: RunDirectory, steps: int, content: str) -> None:
    publish_directory(run.final, {"step": steps, "steps": steps}, lambda path: write(path / "model", content))


def write(path: Path, content: str) -> None:
    path.write_text(content)


@pytest.mark.parametrize("swaps", [True, False], ids=["by one exchange", "where the file system cannot exchange"])
def test_final_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swaps: bool) -> None:
    run = RunDirectory(tmp_path)
    if not swaps:
        monkeypatch.setattr(atomic, "swap", lambda a, b: False)
    for content in ("old", "new"):
        publish_final(run, 10, content)
    assert (run.final / "model").read_text() == "new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final"]


def test_finished_needs_the_model_and_the_steps(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.finished(10) is None
    run.summary.write_text(json.dumps({"steps": 10}))
    assert run.finished(10) is None
    run.final.mkdir()
    assert run.finished(10) == {"steps": 10}, "an older version's model has no manifest"
    run.final.rmdir()
    publish_final(run, 10, "model")
    assert run.finished(10) == {"steps": 10}
    assert run.finished(11) is None
    publish_final(run, 12, "a longer run's, whose summary a power loss took")
    assert run.finished(10) is None


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"steps": "many"}', "\0" * 40, "[" * 100_000])
def test_a_broken_summary_is_one_line(tmp_path: Path, content: str) -> None:
    run = RunDirectory(tmp_path)
    publish_final(run, 10, "model")
    run.summary.write_text(content)
    with pytest.raises(UserError, match=r"summary\.json cannot be read") as caught:
        run.finished(10)
    assert "\n" not in str(caught.value)


def test_an_old_run_is_moved_aside_under_a_free_name(tmp_path: Path, config: TrainConfig) -> None:
    for number in (1, 2):
        run = RunDirectory(tmp_path / "run")
        run.check(config)
        assert begin_anew(run) is None, "nobody has claimed it"
        run.begin(config, [])
        assert begin_anew(run) == tmp_path / f"run.old-{number}"
        assert not run.path.exists()
        assert (tmp_path / f"run.old-{number}" / "config.toml").exists()


def test_a_run_in_use_is_not_moved_aside(tmp_path: Path, config: TrainConfig) -> None:
    run = RunDirectory(tmp_path / "run")
    run.check(config)
    run.begin(config, [])
    holder = subprocess.Popen(
        [sys.executable, "-c", JOIN, str(run.path), "0"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UserError, match="is in use by"):
            begin_anew(run)
    finally:
        holder.kill()
        holder.wait()
    assert run.claimed


def test_atomic_writes(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a", "one")
    write_atomically(tmp_path / "a", "two")
    assert (tmp_path / "a").read_text() == "two"
    assert len(list(tmp_path.iterdir())) == 1


JOIN = """
import sys
from distmerge.rundir.layout import Lock, RunDirectory
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
