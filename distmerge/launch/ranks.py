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
from typing import Any

from distmerge.errors import UserError
from distmerge.launch.interrupts import EARS, LAUNCHED, REQUEUE, end, ignore, status_of

DIVERGED = 3
"""The exit status of a run that has come to its end with a model that is no result."""

HANDLED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Signals that the agent passes on to the ranks."""

GRACE_SECONDS = 60
"""How long ranks that were told to leave may take: a step, or an evaluation, and a commit."""

STOP_REPORTED = "left"
"""Is on the board where rank 0 has said that the job leaves, and at which step."""


@dataclass(frozen=True)
class Place:
    rank: int
    world: int
    local_rank: int
    local_world: int
    name: str = ""
    """Where a job trains several experts side by side: this one's. Rank and world are then those in it."""


def number_of(name: str, least: int, most: int | None = None, default: int | None = None) -> int:
    """A variable of the environment that must be an integer.

    Raises:
        UserError: naming it.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    allowed = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}" if most > least else f"{least}"
    if text is None:
        raise UserError(f"the environment must have {name}, {allowed}: it says that this process is a rank")
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise UserError(f"{name} must be {allowed}, got {text!r}")
    return value


def place() -> Place | None:
    """This process's place among the ranks; None where nobody launched it as one."""
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        world = number_of("WORLD_SIZE", 1, 1 << 20)
        local_world = number_of("LOCAL_WORLD_SIZE", 1, world, default=world)
        local_rank = number_of("LOCAL_RANK", 0, local_world - 1, default=0)
        return Place(number_of("RANK", 0, world - 1), world, local_rank, local_world)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and number_of("SLURM_NTASKS", 1, default=1) > 1:
        return slurm_place()
    return None


def slurm_place() -> Place:
    """A task of srun; the rendezvous variables that torch wants are derived where they are not set."""
    env = os.environ
    world = number_of("SLURM_NTASKS", 1)
    rank, local_rank = number_of("SLURM_PROCID", 0, world - 1), number_of("SLURM_LOCALID", 0, world - 1)
    per_node = env.get("SLURM_NTASKS_PER_NODE", "").split("(")[0]
    local_world = int(per_node) if per_node.isdigit() else world // number_of("SLURM_NNODES", 1, world, default=1)
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_slurm_host()
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(20000 + number_of("SLURM_JOB_ID", 0) % 20000)
    env.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_world))
    return Place(rank, world, local_rank, local_world)


def first_slurm_host() -> str:
    """Where rank 0 of a step of srun runs."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    try:
        said = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return said.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f'MASTER_ADDR must be set where scontrol does not say which hosts SLURM_STEP_NODELIST "{nodes}" is'
        ) from None


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
    before = EARS.hear(unless_the_agent_does)
    try:
        return run_agent(ranks, arguments)
    finally:
        EARS.hear(before)
        EARS.take_back()


def run_agent(ranks: int, arguments: list[str]) -> int:
    """The same, by torch's agent."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from distmerge.launch.loopback import BACKEND, Loopback

    logging.disable(logging.CRITICAL)  # the agent logs what is said below in a line
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        rdzv_backend=BACKEND,
        run_id=f"distmerge-{os.getpid()}",
        max_restarts=0,
        signals_to_handle=",".join(HANDLED),
        shutdown_timeout=GRACE_SECONDS,
    )
    os.environ[LAUNCHED] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the trainer sets its threads itself
    try:
        elastic_launch(config, sys.executable)("-m", "distmerge", *arguments)
    except ChildFailedError as error:
        return explain_failure(error)
    except SignalException as error:
        if not Loopback.said(STOP_REPORTED):
            end_line = f"interrupted by {error.sigval.name}; start the same command again to resume from the newest checkpoint"
            print(("\n" if sys.stderr.isatty() else "") + end_line, file=sys.stderr)
        return status_of(int(error.sigval))
    return 0


def unless_the_agent_does(number: int) -> None:
    """Hear a signal while torch's agent is not there yet to pass it on to the ranks."""
    if signal.getsignal(number) is ignore:
        end(number)


def torchrun(arguments: list[str]) -> int:
    """torchrun's command line, for one node of several: it ends with a line instead of a traceback, with the job's status."""
    import logging

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # read when torch is loaded; the ranks have it, too
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    EARS.hear(unless_the_agent_does)
    logging.disable(logging.CRITICAL)
    os.environ[LAUNCHED] = str(os.getpid())
    try:
        run.main(["--signals-to-handle", ",".join(HANDLED), *arguments])
    except ChildFailedError as error:
        return explain_failure(error)
    except SignalException as error:
        print(
            f"interrupted by {error.sigval.name}: this node's ranks have left; start the job again to resume", file=sys.stderr
        )
        return REQUEUE if error.sigval in (signal.SIGTERM, signal.SIGUSR1) else 128 + int(error.sigval)
    except (RendezvousError, RuntimeError, OSError, ValueError) as error:
        print(f"error: torchrun: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


def explain_failure(error: Any) -> int:
    """Say which rank failed where it could not say so itself, and give the job's exit status."""
    statuses = [failure.exitcode for failure in error.failures.values()]  # in the order in which the agent saw them
    if 2 in statuses:
        return 2  # a user's error: the rank has printed its line
    # Where one was killed, the agent tells the others to leave, and they do so with a status that would hide it.
    for status in (DIVERGED, REQUEUE, 128 + signal.SIGINT, 128 + signal.SIGHUP) if statuses[0] > 0 else ():
        if status in statuses:
            return status
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"error: rank {rank} was killed by {name}; start the same command again to resume", file=sys.stderr)
    else:
        print(f"error: rank {rank} left with status {failure.exitcode}, see above", file=sys.stderr)
    return 1
