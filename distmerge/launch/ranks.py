"""Launching ranks, and finding out which rank a process is.

Under torchrun, srun or the deepspeed launcher a process reads its rank from the environment. A process started on its own
launches the ranks through torchrun's API. Each rank runs the same code in both cases.
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
from distmerge.launch.interrupts import LAUNCHED, REQUEUE, SIGNAL_THREAD, end, exit_status, ignore

DIVERGED = 3
"""The exit status of a run that has completed its steps with a diverged model."""

HANDLED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1")
"""Signals that torchrun's agent forwards to the ranks."""

GRACE_SECONDS = 60
"""How long ranks may take to stop: one step or evaluation, and a commit."""

STOP_REPORTED = "left"
"""Key on the notice board, set when rank 0 has printed that the job stops early and at which step."""


@dataclass(frozen=True)
class Place:
    """A rank's place in its job.

    Attributes:
        rank, world: the rank, and the number of ranks.
        local_rank, local_world: the same on this node.
        name: this rank's expert, if a job trains several side by side. ``rank`` and ``world`` then count its ranks only.
    """

    rank: int
    world: int
    local_rank: int
    local_world: int
    name: str = ""


def environment_integer(name: str, least: int, most: int | None = None, default: int | None = None) -> int:
    """The value of an environment variable, which must be an integer from ``least`` to ``most``.

    Raises:
        UserError: if it is not, or if it is not set and there is no default.
    """
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    allowed = f"an integer >= {least}" if most is None else f"an integer from {least} to {most}" if most > least else f"{least}"
    if text is None:
        raise UserError(f"{name} must be set to {allowed}, since other environment variables make this process a rank of a job")
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least or (most is not None and value > most):
        raise UserError(f"{name} must be {allowed}, got {text!r}")
    return value


def place() -> Place | None:
    """This process's place in its job, or None if it was not launched as a rank.

    Raises:
        UserError: for environment variables that are missing or not valid.
    """
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        world = environment_integer("WORLD_SIZE", 1, 1 << 20)
        local_world = environment_integer("LOCAL_WORLD_SIZE", 1, world, default=world)
        local_rank = environment_integer("LOCAL_RANK", 0, local_world - 1, default=0)
        return Place(environment_integer("RANK", 0, world - 1), world, local_rank, local_world)
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and environment_integer("SLURM_NTASKS", 1, default=1) > 1:
        return slurm_place()
    return None


def slurm_place() -> Place:
    """The place of a task of srun. Derives the rendezvous variables that torch needs, unless they are set."""
    env = os.environ
    world = environment_integer("SLURM_NTASKS", 1)
    rank, local_rank = environment_integer("SLURM_PROCID", 0, world - 1), environment_integer("SLURM_LOCALID", 0, world - 1)
    per_node = env.get("SLURM_NTASKS_PER_NODE", "").split("(")[0]
    local_world = int(per_node) if per_node.isdigit() else world // environment_integer("SLURM_NNODES", 1, world, default=1)
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = first_slurm_host()
    if "MASTER_PORT" not in env:
        env["MASTER_PORT"] = str(20000 + environment_integer("SLURM_JOB_ID", 0) % 20000)
    env.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(local_rank), LOCAL_WORLD_SIZE=str(local_world))
    return Place(rank, world, local_rank, local_world)


def first_slurm_host() -> str:
    """The host of rank 0 of a job step of srun."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    try:
        result = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return result.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        raise UserError(
            f'MASTER_ADDR must be set, since scontrol cannot resolve the hosts of SLURM_STEP_NODELIST "{nodes}"'
        ) from None


def die_with_parent() -> None:
    """Make this rank die when its launcher dies, even by SIGKILL.

    torch's agent starts each rank in a session of its own, so a killed launcher would leave orphans that keep writing. A
    launcher that died before this call is noticed by its process id, which the ranks of distmerge's own launcher know. A
    torchrun that died so early has taken the rendezvous store with it, so its ranks fail anyway.
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
    before = SIGNAL_THREAD.set_callback(end_unless_agent_handles)
    try:
        return run_agent(ranks, arguments)
    finally:
        SIGNAL_THREAD.set_callback(before)
        SIGNAL_THREAD.restore_handlers()


def run_agent(ranks: int, arguments: list[str]) -> int:
    """Run the ranks under torch's agent; see :func:`launch`."""
    import logging

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from distmerge.launch.loopback import BACKEND, Loopback

    logging.disable(logging.CRITICAL)  # the agent would log at length what is reported below in one line
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
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does; the trainer sets the number of its threads itself
    try:
        elastic_launch(config, sys.executable)("-m", "distmerge", *arguments)
    except ChildFailedError as error:
        return explain_failure(error)
    except SignalException as error:
        if not Loopback.has_key(STOP_REPORTED):
            end_line = f"interrupted by {error.sigval.name}; start the same command again to resume from the newest checkpoint"
            print(("\n" if sys.stderr.isatty() else "") + end_line, file=sys.stderr)
        return exit_status(int(error.sigval))
    return 0


def end_unless_agent_handles(number: int) -> None:
    """Signal callback of launchers: end the process, unless torch's agent has installed handlers and forwards the signal."""
    if signal.getsignal(number) is ignore:
        end(number)


def torchrun(arguments: list[str]) -> int:
    """Run torchrun's command line, for one node of several. A failure is reported in one line instead of a traceback.

    Returns:
        the job's exit status.
    """
    import logging

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads it when it is imported; the ranks inherit it
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    SIGNAL_THREAD.set_callback(end_unless_agent_handles)
    logging.disable(logging.CRITICAL)
    os.environ[LAUNCHED] = str(os.getpid())
    try:
        run.main(["--signals-to-handle", ",".join(HANDLED), *arguments])
    except ChildFailedError as error:
        return explain_failure(error)
    except SignalException as error:
        print(
            f"interrupted by {error.sigval.name}: this node's ranks have exited; start the job again to resume", file=sys.stderr
        )
        return REQUEUE if error.sigval in (signal.SIGTERM, signal.SIGUSR1) else 128 + int(error.sigval)
    except (RendezvousError, RuntimeError, OSError, ValueError) as error:
        print(f"error: torchrun: {' '.join(str(error).split())[:300]}", file=sys.stderr)
        return 1
    return 0


def explain_failure(error: Any) -> int:
    """Print which rank failed, unless the rank has reported its error itself.

    Returns:
        the job's exit status.
    """
    statuses = [failure.exitcode for failure in error.failures.values()]  # in the order in which the agent noticed them
    if 2 in statuses:
        return 2  # a user error, which the rank has printed
    # After a rank was killed (a negative status), the agent stops the others, whose exit statuses would hide the kill.
    for status in (DIVERGED, REQUEUE, 128 + signal.SIGINT, 128 + signal.SIGHUP) if statuses[0] > 0 else ():
        if status in statuses:
            return status
    rank, failure = error.get_first_failure()
    if failure.exitcode < 0:
        name = signal.Signals(-failure.exitcode).name
        print(f"error: rank {rank} was killed by {name}; start the same command again to resume", file=sys.stderr)
    else:
        print(f"error: rank {rank} exited with status {failure.exitcode}, see above", file=sys.stderr)
    return 1
