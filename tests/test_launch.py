"""Launching, in real processes from end to end: the ways to do it, kill and resume, dead peers."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distmerge.checkpoints.store import published_checkpoints
from distmerge.files.directories import verify
from tests import jobs

STEPS = 60

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to find the ranks")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ``distmerge train`` took from its beginning to its end."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    job = jobs.distmerge(["train", jobs.write_config(folder)], folder / "log")
    assert job.wait() == 0, job.output
    return folder


@pytest.fixture
def config(uninterrupted: Path) -> str:
    return str(uninterrupted / "config.toml")


def assert_same_run(run: Path, expected: Path) -> None:
    lines, expected_lines = jobs.untimed(run), jobs.untimed(expected)
    for line, expected_line in zip(lines, expected_lines, strict=False):
        assert line == expected_line, f"the first line that differs is of step {expected_line['step']}"
    assert len(lines) == len(expected_lines)
    assert jobs.final_bytes(run) == jobs.final_bytes(expected)


# ---- launching


def test_the_end_of_a_run(uninterrupted: Path) -> None:
    run = uninterrupted / "run"
    output = (uninterrupted / "log").read_text()
    for word in ("eval loss", "tokens/s", "sent per worker", "data parallelism", str(run / "final"), "--logdir"):
        assert word in output
    lines = jobs.lines_of(run)
    assert lines[0]["step"] == 0
    assert "eval/loss" in lines[0]
    assert [line["step"] for line in lines] == [*range(STEPS + 1), STEPS]
    assert lines[-1]["eval/loss"] < lines[0]["eval/loss"] - 0.5
    keys = {"step", "tokens", "train/loss", "lr", "grad_norm", "tokens_per_second", "merge/bytes_sent", "merge/collectives"}
    assert keys <= lines[7].keys()
    assert {"merge/seconds", "merge/divergence"} <= lines[7].keys(), "a merge was due at step 7"
    assert lines[7]["tokens"] == 7 * 2 * 2 * 4 * 32
    assert [path.name for path in published_checkpoints(run / "checkpoints")] == [f"step-{s:08}" for s in (50, 55, 60)]
    for name in ("config.toml", "tensorboard", "final/config.json", "final/tokenizer_config.json", "summary.json"):
        assert (run / name).exists(), name


def test_torchrun_gives_the_same_bytes(uninterrupted: Path, config: str, tmp_path: Path) -> None:
    job = jobs.torchrun(2, ["train", config, "--run-dir", str(tmp_path / "run")], tmp_path / "log")
    assert job.wait() == 0, job.output
    assert_same_run(tmp_path / "run", uninterrupted / "run")


def test_the_same_command_gives_the_same_bytes(uninterrupted: Path, config: str, tmp_path: Path) -> None:
    job = jobs.distmerge(["train", config, "--run-dir", str(tmp_path / "run")], tmp_path / "log")
    assert job.wait() == 0, job.output
    assert_same_run(tmp_path / "run", uninterrupted / "run")


# ---- kill and resume


def kill_all(job: jobs.Job, run: Path) -> None:
    for process in (job.process.pid, *job.ranks().values()):
        jobs.kill(process, signal.SIGKILL)


def kill_launcher(job: jobs.Job, run: Path) -> None:
    jobs.kill(job.process.pid, signal.SIGKILL)


def kill_rank(job: jobs.Job, run: Path) -> None:
    jobs.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait() == 1
    assert "error: rank 1 was killed by SIGKILL; start the same command again to resume" in job.output


def kill_all_in_a_commit(job: jobs.Job, run: Path) -> None:
    """All are stopped when a checkpoint's temporary directory is seen, and killed if it is there still."""
    ranks = list(job.ranks().values())

    def caught() -> bool:
        if not list((run / "checkpoints").glob(".step-*")):
            return False
        for process in ranks:
            jobs.kill(process, signal.SIGSTOP)
        if list((run / "checkpoints").glob(".step-*")):
            return True
        for process in ranks:
            jobs.kill(process, signal.SIGCONT)
        return False

    jobs.wait_for(caught, "a checkpoint in the making")
    kill_all(job, run)
    assert list((run / "checkpoints").glob(".step-*")), "the kill landed in the commit"


def reach(job: jobs.Job, run: Path, step: int) -> None:
    """Wait until the job has trained to ``step``."""
    jobs.wait_for(lambda: jobs.last_step(run) >= step or job.process.poll() is not None, f"step {step}")
    assert job.process.poll() is None, job.output


KILLS = (kill_all, kill_launcher, kill_rank, kill_all_in_a_commit, kill_all)


def test_kill_and_resume_moves_no_bit(uninterrupted: Path, config: str, tmp_path: Path, started: list[jobs.Job]) -> None:
    """One run, killed again and again at seeded moments and in different ways, and started again until it ends."""
    moments = random.Random(2)
    run = tmp_path / "run"
    arguments = ["train", config, "--run-dir", str(run)]
    resumed_from, resumed_in_mid_round = 0, False
    for index, kill in enumerate(KILLS):
        job = jobs.distmerge(arguments, tmp_path / f"log-{index}")
        started.append(job)
        target = resumed_from + moments.randint(6, 9)
        reach(job, run, target)
        ranks = job.ranks()
        assert sorted(ranks) == [0, 1]
        time.sleep(moments.uniform(0, 0.02))
        kill(job, run)
        jobs.wait_for(lambda gone=ranks: not any(map(jobs.alive, gone.values())), "no rank survives")
        job.wait()
        step = jobs.last_step(run)
        assert target <= step < STEPS, f"{kill.__name__} landed between two steps"
        checkpoints = published_checkpoints(run / "checkpoints")
        assert checkpoints
        assert [verify(path) for path in checkpoints] == [None] * len(checkpoints)
        resumed_from = int(checkpoints[-1].name.removeprefix("step-"))
        assert resumed_from >= step - step % 5 - 5
        resumed_in_mid_round |= resumed_from % 7 != 0
    assert resumed_in_mid_round
    job = jobs.distmerge(arguments, tmp_path / "log-end")
    started.append(job)
    assert job.wait() == 0, job.output
    assert f"resuming from {run}/checkpoints/step-{resumed_from:08}" in job.output
    assert_same_run(run, uninterrupted / "run")
    assert not list((run / "checkpoints").glob(".*"))


def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(uninterrupted: Path, config: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted / "run", run)
    shutil.rmtree(run / "final")
    newest = run / "checkpoints" / "step-00000060"
    damaged = newest / "parameters-00001.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-7] ^= 4
    damaged.write_bytes(content)
    job = jobs.distmerge(["train", config, "--run-dir", str(run)], tmp_path / "log")
    assert job.wait() == 0, job.output
    reason = "parameters-00001.safetensors does not have the SHA-256 that manifest.json says"
    assert f"rejected checkpoint {newest}: {reason}" in job.output
    assert f"resuming from {run}/checkpoints/step-00000055" in job.output
    assert (run / "checkpoints" / "step-00000060.rejected").is_dir()
    assert_same_run(run, uninterrupted / "run")


# ---- sockets


def listening_addresses(process: int) -> set[str]:
    """Local addresses, as the kernel writes them in hexadecimal, of a process's sockets that listen."""
    sockets = set()
    for link in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(os.readlink(link))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A" and f"socket:[{words[9]}]" in sockets:
                found.add(words[1].partition(":")[0])
    return found


def test_a_job_on_one_machine_listens_on_loopback_alone(config: str, tmp_path: Path, started: list[jobs.Job]) -> None:
    job = jobs.distmerge(["train", config, "--run-dir", str(tmp_path / "run"), "--steps", "100000"], tmp_path / "log")
    started.append(job)
    reach(job, tmp_path / "run", 2)
    found = [listening_addresses(process) for process in (job.process.pid, *job.ranks().values())]
    assert all(found), "the launcher's store, and the collectives of each rank"
    loopback = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    assert set().union(*found) <= loopback, found


# ---- ranks without a launcher


def test_a_rank_whose_launcher_died_before_it_looked_ends(tmp_path: Path) -> None:
    code = "from distmerge.launch.ranks import die_with_parent; die_with_parent(); print('lives')"
    for launcher, outcome in ((os.getpid(), (0, "lives\n")), (os.getppid(), (1, ""))):
        environment = os.environ | {"DISTMERGE_LAUNCHED": str(launcher)}
        job = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=jobs.PATIENCE_SECONDS
        )
        assert (job.returncode, job.stdout) == outcome
