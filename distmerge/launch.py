"""From one command to many ranks, and the place of a rank among them.

Under torchrun, srun or the deepspeed launcher a process reads its place from the environment. Started alone, it launches
the ranks through torchrun's own API. Both ways run the same code in each rank.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

REQUEUE = 75
"""The exit status that asks to be started again: EX_TEMPFAIL of sysexits.h."""

DIVERGED = 3
"""The exit status of a run that has come to its end with a model that is no result."""

LAUNCHED = "DISTMERGE_LAUNCHED"
"""The launcher's process in the environment of its ranks, where it is ours: it speaks for them when they are interrupted."""


@dataclass(frozen=True)
class Place:
    rank: int
    world: int
    local_rank: int
    local_world: int
    name: str = ""
    """Where a job trains several experts side by side: this one's. Rank and world are then those in it."""


def place() -> Place | None:
    """This process's place among the ranks; None where nobody launched it as one."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        world = int(env["WORLD_SIZE"])
        return Place(int(env["RANK"]), world, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", world)))
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return slurm_place()
    return None


def slurm_place() -> Place:
    """A task of srun; the rendezvous variables that torch wants are derived where they are not set."""
    env = os.environ
    rank, world = int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"])
    local_world = int(env.get("SLURM_NTASKS_PER_NODE", "").split("(")[0] or world // int(env.get("SLURM_NNODES", "1")))
    if "MASTER_ADDR" not in env:
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_STEP_NODELIST"]], capture_output=True, text=True, check=True
        )
        env["MASTER_ADDR"] = hosts.stdout.split()[0]
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    env.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=env["SLURM_LOCALID"], LOCAL_WORLD_SIZE=str(local_world))
    return Place(rank, world, int(env["SLURM_LOCALID"]), local_world)


def die_with_parent() -> None:
    """End this rank when its launcher dies, however that happens.

    torch's agent starts ranks in sessions of their own, so a SIGKILLed launcher would leave orphans that go on writing.
    One that died before this call is known by its number, where it is ours; torchrun takes the rendezvous store with it.
    """
    parent = int(os.environ.get(LAUNCHED, os.getppid()))
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    else:
        threading.Thread(target=watch_parent, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def watch_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def launch(ranks: int, arguments: list[str]) -> int:
    """Run ``python -m distmerge ARGUMENTS`` as ``ranks`` local ranks and return the job's exit status."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.CRITICAL)  # the agent logs what is said below in a line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=f"distmerge-{os.getpid()}",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        shutdown_timeout=60,  # ranks that are told to leave finish their round and commit a checkpoint
    )
    os.environ[LAUNCHED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the trainer sets its threads itself
    try:
        elastic_launch(config, sys.executable)("-m", "distmerge", *arguments)
    except ChildFailedError as error:
        return explain_failure(error)
    except SignalException as error:
        print("\ninterrupted; start the same command again to resume from the newest checkpoint", file=sys.stderr)
        preempted = error.sigval in (signal.SIGTERM, signal.SIGUSR1)
        return REQUEUE if preempted else 128 + int(error.sigval)
    return 0


def explain_failure(error) -> int:
    """Say which rank failed where it could not say so itself, and give the job's exit status."""
    statuses = {rank: failure.exitcode for rank, failure in error.failures.items()}
    if 2 in statuses.values():
        return 2  # a user's error: the rank has printed its line
    for status in (DIVERGED, REQUEUE):
        if status in statuses.values():
            return status
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"error: rank {rank} was killed by {name}; start the same command again to resume", file=sys.stderr)
    else:
        print(f"error: rank {rank} left with status {failure.exitcode}, see above", file=sys.stderr)
    return 1
