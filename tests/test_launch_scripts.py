"""launch/: as far as one machine goes. Two torchrun nodes on loopback, restarts, leaving when told, DeepSpeed's launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import jobs
from tests.ranks import free_port

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.is_file())
QUICK = ("--train.gradient-accumulation", "1")

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to find the ranks")


class Script(jobs.Job):
    """A launch script with its environment."""

    def __init__(self, name: str, arguments: list[str], log: Path, **environment: str):
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [str(LAUNCH / name), *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT)} | environment,
            )


@pytest.fixture
def started() -> Iterator[list[Script]]:
    running: list[Script] = []
    yield running
    for job in running:
        job.end()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_clean(path: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    if not shellcheck.exists():
        pytest.skip("shellcheck is not installed here")
    for command in (["bash", "-n", str(path)], [str(shellcheck), str(path)]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout + run.stderr
    assert os.access(path, os.X_OK)


def test_two_torchrun_nodes(tmp_path: Path, started: list[Script]) -> None:
    """A worker of two ranks on each "node"; the run directory on the file system that both see."""
    config = jobs.write_config(tmp_path)
    port = str(free_port())
    for node in ("0", "1"):
        arguments = [config, "--steps", "14", "--train.batch-size", "1", *QUICK]
        node_job = Script("torchrun.sh", arguments, tmp_path / f"node-{node}", NODES="2", NODE_RANK=node, RANKS="2", PORT=port)
        started.append(node_job)
    for job in started:
        assert job.wait() == 0, job.output
    assert jobs.last_step(tmp_path / "run") == 14
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_killed_rank_is_started_again_and_goes_on(tmp_path: Path, started: list[Script]) -> None:
    config = jobs.write_config(tmp_path)
    arguments = [config, "--steps", "30", *QUICK, "--run-dir"]
    job = Script("torchrun.sh", [*arguments, str(tmp_path / "killed")], tmp_path / "log", RANKS="2", PORT=str(free_port()))
    started.append(job)
    jobs.wait_for(lambda: jobs.last_step(tmp_path / "killed") >= 8 or job.process.poll() is not None, "step 8")
    jobs.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait() == 0, job.output
    assert "resuming from" in job.output
    whole = Script("local.sh", [*arguments, str(tmp_path / "whole")], tmp_path / "log-whole")
    started.append(whole)
    assert whole.wait() == 0, whole.output
    assert jobs.final_bytes(tmp_path / "killed") == jobs.final_bytes(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["TERM", "USR1"])
def test_told_to_leave_it_commits_and_asks_for_a_requeue(tmp_path: Path, started: list[Script], number: int) -> None:
    config = jobs.write_config(tmp_path)
    run = tmp_path / "run"
    arguments = [config, "--steps", "100000", *QUICK, "--checkpoint.every", "100000", "--evaluate.every", "100000"]
    job = Script("local.sh", arguments, tmp_path / "log")
    started.append(job)
    jobs.wait_for(lambda: jobs.last_step(run) >= 8 or job.process.poll() is not None, "step 8")
    jobs.kill(job.process.pid, number)
    assert job.wait() == 75, job.output
    checkpoints = list((run / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 1
    step = int(checkpoints[0].name.removeprefix("step-"))
    assert step >= 8
    assert f"stopped early: checkpoint of step {step} committed, exit status 75 asks for a requeue" in job.output
    assert "Traceback" not in job.output and "interrupted" not in job.output, "it is told once"
    again = Script("local.sh", [config, "--steps", str(step + 3), *arguments[3:]], tmp_path / "log-again")
    started.append(again)
    assert again.wait() == 0, again.output
    assert f"resuming from {checkpoints[0]}" in again.output


@pytest.mark.parametrize("told", [0, 1], ids=["the first", "the second"])
def test_one_of_two_nodes_is_told_and_all_leave_with_a_checkpoint(tmp_path: Path, started: list[Script], told: int) -> None:
    config = jobs.write_config(tmp_path)
    run = tmp_path / "run"
    arguments = [config, "--steps", "100000", *QUICK, "--checkpoint.every", "100000", "--merge.0.every", "50000"]
    port = str(free_port())
    for node in ("0", "1"):
        environment = {"NODES": "2", "NODE_RANK": node, "RANKS": "1", "PORT": port}
        started.append(
            Script("torchrun.sh", [*arguments, "--evaluate.every", "100000"], tmp_path / f"node-{node}", **environment)
        )
    jobs.wait_for(lambda: jobs.last_step(run) >= 3 or any(job.process.poll() is not None for job in started), "step 3")
    jobs.kill(started[told].process.pid, signal.SIGTERM)
    assert [job.wait() for job in started] == [75, 75], [job.output for job in started]
    assert len(list((run / "checkpoints").glob("step-*"))) == 1, "workers that meet at step 50000 agree on one before it"
    assert not any("Traceback" in job.output for job in started)


def test_deepspeeds_launcher(tmp_path: Path, started: list[Script]) -> None:
    pytest.importorskip("deepspeed")
    config = jobs.write_config(tmp_path)
    engine = ["--engine.kind", "deepspeed", "--engine.config", str(ROOT / "configs" / "deepspeed" / "zero2.json")]
    arguments = [config, "--steps", "9", *QUICK, *engine]
    job = Script("deepspeed.sh", arguments, tmp_path / "log", RANKS="2", PORT=str(free_port()), DS_ACCELERATOR="cpu")
    started.append(job)
    assert job.wait() == 0, job.output
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
