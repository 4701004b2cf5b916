"""Ctrl-C and SIGTERM in every phase, imports too: one line, and a checkpoint where a step was taken."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import jobs

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to find the phases")


def listens(job: jobs.Job, run: Path) -> bool:
    """From the first moment: Python itself catches no SIGUSR1."""
    for line in Path(f"/proc/{job.process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (signal.SIGUSR1 - 1) & 1)
    return False


def imports_torch(job: jobs.Job, run: Path) -> bool:
    return "libtorch" in Path(f"/proc/{job.process.pid}/maps").read_text()


def has_ranks(job: jobs.Job, run: Path) -> bool:
    return len(job.ranks()) == 2


def trains(job: jobs.Job, run: Path) -> bool:
    return jobs.last_step(run) >= 3


PHASES = [
    (listens, signal.SIGINT, 130),
    pytest.param(listens, signal.SIGTERM, 75, marks=pytest.mark.full),
    pytest.param(imports_torch, signal.SIGINT, 130, marks=pytest.mark.full),
    (imports_torch, signal.SIGTERM, 75),
    (has_ranks, signal.SIGINT, 130),
    pytest.param(has_ranks, signal.SIGTERM, 75, marks=pytest.mark.full),
    pytest.param(trains, signal.SIGINT, 130, marks=pytest.mark.full),
    (trains, signal.SIGTERM, 75),
]
"""Each phase and each signal; all pairs in full."""


@pytest.mark.parametrize(("phase", "number", "status"), PHASES, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_signal_is_one_line_in_every_phase(
    tmp_path: Path, started: list[jobs.Job], phase: Callable[[jobs.Job, Path], bool], number: int, status: int
) -> None:
    run = tmp_path / "run"
    rare = ("--checkpoint.every", "100000", "--merge.0.every", "50000", "--evaluate.every", "100000")
    job = jobs.distmerge(["train", jobs.write_config(tmp_path), "--steps", "100000", *rare], tmp_path / "log")
    started.append(job)
    jobs.wait_for(lambda: phase(job, run) or job.process.poll() is not None, phase.__name__)
    jobs.kill(job.process.pid, number)
    assert job.wait() == status, job.output
    assert "Traceback" not in job.output
    told = [line for line in job.output.splitlines() if line.startswith(("interrupted by", "stopped early"))]
    assert len(told) == 1, job.output
    assert bool(list((run / "checkpoints").glob("step-*"))) == told[0].startswith("stopped early")
    if phase is trains:
        assert told[0].startswith("stopped early: checkpoint of step "), (
            "workers that meet at step 50000 agree on one before it"
        )


@pytest.mark.parametrize("verb", ["eval", "merge", "window", "diagnose", "ptm"])
def test_a_signal_is_one_line_of_other_verbs(tmp_path: Path, started: list[jobs.Job], verb: str) -> None:
    job = jobs.distmerge([verb, "--help"], tmp_path / "log")
    started.append(job)
    jobs.wait_for(lambda: job.process.poll() is not None or listens(job, tmp_path), "it listens")
    jobs.kill(job.process.pid, signal.SIGINT)
    assert job.wait() in (130, 0)
    assert "Traceback" not in job.output
