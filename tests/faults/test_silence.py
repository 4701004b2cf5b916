"""Whatever dies, stops or comes late, every survivor ends in time and says who it was: in real processes, by real signals."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests import jobs
from tests.ranks import free_port

TIMEOUT_SECONDS = 40
GONE = "died or stopped answering; start the same command again to resume"

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc to find the ranks")


def start(folder: Path, started: list[jobs.Job], *arguments: str) -> list[jobs.Job]:
    """Two ranks without a launcher: rank 0 holds the store."""
    folder.mkdir()
    config = jobs.write_config(folder)
    place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        jobs.distmerge(
            ["train", config, "--steps", "100000", *arguments],
            folder / f"log-{rank}",
            place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    started += ranks
    return ranks


def reach(job: jobs.Job, run: Path, step: int) -> None:
    jobs.wait_for(lambda: jobs.last_step(run) >= step or job.process.poll() is not None, f"step {step}")
    assert job.process.poll() is None, job.output


def errors_of(job: jobs.Job) -> list[str]:
    return [line for line in job.output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    ("gone", "number"),
    [
        (0, signal.SIGSTOP),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.full),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.full),
        (1, signal.SIGKILL),
    ],
    ids=["the stopped host of the store", "a stopped rank", "the killed host of the store", "a killed rank"],
)
def test_a_survivor_names_the_rank_that_is_gone(tmp_path: Path, started: list[jobs.Job], gone: int, number: int) -> None:
    ranks = start(tmp_path / "job", started, "--mesh.timeout-seconds", str(TIMEOUT_SECONDS))
    reach(ranks[0], tmp_path / "job" / "run", 3)
    jobs.kill(ranks[gone].process.pid, number)
    survivor = ranks[1 - gone]
    assert survivor.wait() == 1, survivor.output
    [said] = errors_of(survivor)
    assert said.startswith(f"error: rank {gone} (worker {gone})") and said.endswith(GONE), survivor.output
    assert "Traceback" not in survivor.output


def test_a_late_rank_is_named_though_it_lives(tmp_path: Path, started: list[jobs.Job]) -> None:
    ranks = start(tmp_path / "job", started, "--mesh.timeout-seconds", str(TIMEOUT_SECONDS))
    reach(ranks[0], tmp_path / "job" / "run", 3)
    while ranks[0].process.poll() is None:  # a stop that the others outwaited is repeated
        jobs.kill(ranks[1].process.pid, signal.SIGSTOP)
        time.sleep(TIMEOUT_SECONDS + 4)
        jobs.kill(ranks[1].process.pid, signal.SIGCONT)
        until = time.monotonic() + 30
        while ranks[0].process.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
    assert [job.wait() for job in ranks] == [1, 1]
    [said] = errors_of(ranks[0])
    assert said.startswith("error: rank 1 (worker 1) was late by more than mesh.timeout_seconds = 40") or said.endswith(GONE)
    assert said.startswith("error: rank 1 (worker 1)")
    assert "Traceback" not in ranks[0].output + ranks[1].output


def test_the_watchdog_names_the_slowest_rank(tmp_path: Path, started: list[jobs.Job]) -> None:
    ranks = start(tmp_path / "job", started, "--mesh.watchdog-seconds", "20")
    reach(ranks[0], tmp_path / "job" / "run", 3)
    jobs.kill(ranks[1].process.pid, signal.SIGSTOP)
    assert ranks[0].wait() == 1, ranks[0].output
    [said] = errors_of(ranks[0])
    assert said == (
        "error: no progress for mesh.watchdog_seconds = 20: no heartbeat from rank 1 (worker 1); "
        "start the same command again to resume"
    )


def agents(folder: Path, started: list[jobs.Job], *arguments: str) -> list[jobs.Job]:
    """Two torchrun agents with a rank each; the first one holds the store."""
    config = jobs.write_config(folder)
    port = str(free_port())
    nodes = []
    for node in ("0", "1"):
        place = ["--nnodes", "2", "--node-rank", node, "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "it"]
        command = [*place, "--rdzv-endpoint", f"localhost:{port}", "--rdzv-conf", "is_host=" + str(int(node == "0"))]
        train = ["-m", "distmerge", "train", config, "--steps", "100000", *arguments]
        nodes.append(jobs.Job(["-m", "torch.distributed.run", *command, *train], folder / f"node-{node}"))
    started += nodes
    return nodes


def test_a_node_survives_the_one_that_holds_the_store(tmp_path: Path, started: list[jobs.Job]) -> None:
    nodes = agents(tmp_path, started, "--mesh.timeout-seconds", str(TIMEOUT_SECONDS))
    reach(nodes[0], tmp_path / "run", 3)
    ranks = {rank: process for node in nodes for rank, process in node.ranks().items()}
    assert sorted(ranks) == [0, 1]
    [of_the_first] = nodes[0].ranks().values()
    [of_the_second] = nodes[1].ranks().values()
    for process in (nodes[0].process.pid, of_the_first):
        os.kill(process, signal.SIGSTOP)
    jobs.wait_for(lambda: not jobs.alive(of_the_second), "the second node's rank ends")
    [said] = errors_of(nodes[1])
    assert "which holds the rendezvous store, died or stopped answering" in said
