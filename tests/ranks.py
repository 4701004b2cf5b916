"""Real ranks for the tests: processes that are started once and import torch once, with a fresh gloo group for each call.

    def worst_rank(scale):                                  # a function of a test module: it is sent by reference
        return scale * dist.get_rank()

    def test_it(ranks):
        assert ranks.run(3, worst_rank, 2) == [0, 2, 4]     # one result a rank

The first ``world`` processes take the call. An exception in a rank is raised in the test, with the rank's traceback. A fresh
group costs some 20 ms, and no test can leave a broken one to the next.
"""

from __future__ import annotations

import contextlib
import gc
import io
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

COLLECTIVE_SECONDS = 600.0
"""A collective whose peer is gone fails after this."""

STRAGGLER_SECONDS = 30.0
"""After one rank raised, the others are given this long to answer; they may hang in a collective."""


class Answer(NamedTuple):
    """What a rank sends back; ``when`` is the time of its error on the machine's one monotonic clock."""

    error: BaseException | None
    result: Any
    when: float


class Ranks:
    """Up to four processes, the first ``world`` of which run a function together."""

    def __init__(self) -> None:
        self.processes: list[tuple[Any, Connection]] = []

    def run(self, world: int, function: Callable[..., Any], *arguments: Any, group: bool = True, seconds: float = 1200) -> list:
        """``function(*arguments)`` on each rank of a world; the results in the order of ranks.

        Args:
            group: with a default process group over gloo. Without one the environment still says rank, world and
                rendezvous, for code that makes its own.
            seconds: how long all of it may take.

        Raises:
            what a rank raised (the one that was first: the others may have failed for it), or TimeoutError.
        """
        self._start(world)
        port = free_port()
        with tempfile.TemporaryDirectory() as folder:
            rendezvous = str(Path(folder) / "group") if group else None
            for rank in range(world):
                self.processes[rank][1].send_bytes(pickle.dumps((rank, world, port, rendezvous, function, arguments)))
            answers = self._collect(world, seconds)
        failures = [answer for answer in answers.values() if answer.error is not None]
        if failures:
            self.close()  # a group that failed on some ranks leaves torch's counters different between them
            first = min(failures, key=lambda answer: answer.when).error
            assert first is not None
            raise first
        return [answers[rank].result for rank in range(world)]

    def _start(self, world: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        while len(self.processes) < world:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self.processes.append((process, ours))

    def _collect(self, world: int, seconds: float) -> dict[int, Answer]:
        answers: dict[int, Answer] = {}
        deadline = time.monotonic() + seconds
        failed = False
        while len(answers) < world:
            waiting = {self.processes[rank][1]: rank for rank in range(world) if rank not in answers}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                self.close()
                if failed:
                    return answers
                raise TimeoutError(f"ranks {sorted(waiting.values())} of {world} did not answer within {seconds} s")
            for connection in ready:
                rank = waiting[connection]  # pyright: ignore[reportArgumentType]
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())  # pyright: ignore[reportAttributeAccessIssue]
                except EOFError:
                    answers[rank] = Answer(RuntimeError(f"rank {rank} died"), None, when=0.0)
                if answers[rank].error is not None and not failed:
                    failed, deadline = True, min(deadline, time.monotonic() + STRAGGLER_SECONDS)
        return answers

    def close(self) -> None:
        """End all processes; the next run starts new ones."""
        for process, connection in self.processes:
            process.kill()
            process.join()
            connection.close()
        self.processes = []


def serve(connection: Connection) -> None:
    """One rank's life: run what is sent, answer."""
    from distmerge.launch.ranks import die_with_parent

    die_with_parent()
    # A rank leaves init_process_group when all have: one that is quick must not take its group down while another connects.
    os.environ["TORCH_DIST_INIT_BARRIER"] = "1"
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        try:
            answer = take_part(*pickle.loads(request))
        except (ImportError, AttributeError) as error:  # the function is not to be found in its module
            answer = Answer(portable(error), None, time.monotonic())
        try:
            connection.send_bytes(pickle.dumps(answer))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            connection.send_bytes(pickle.dumps(Answer(portable(error), None, time.monotonic())))


def take_part(rank: int, world: int, port: int, rendezvous: str | None, function: Callable, arguments: tuple) -> Answer:
    import torch
    import torch.distributed as dist

    place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "localhost"})
    try:
        if rendezvous is not None:
            patience = timedelta(seconds=COLLECTIVE_SECONDS)
            dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world, timeout=patience)
        return Answer(None, function(*arguments), time.monotonic())
    except BaseException as error:
        return Answer(portable(error), None, time.monotonic())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        torch.set_num_threads(1)


def portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note, in a form that pickles."""
    text = "".join(traceback.format_exception(error))
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:
        copy = RuntimeError(f"{type(error).__name__}: {error}")
    copy.add_note(f"in rank {os.environ.get('RANK')}:\n{text}")
    return copy


def free_port() -> int:
    """A port that nobody has, below those that the kernel deals out: a client that tries one of those may meet itself."""
    while True:
        port = random.SystemRandom().randint(15000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("localhost", port))
            return port


class Outcome(NamedTuple):
    status: int
    stdout: str
    stderr: str


def command(arguments: list[str]) -> Outcome:
    """``distmerge ARGUMENTS`` in this process, as a rank that someone launched where the environment says so."""
    from distmerge.cli import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["distmerge", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main.main()
        raise AssertionError("main leaves by SystemExit")
    except SystemExit as leave:
        return Outcome(int(leave.code or 0), out.getvalue(), err.getvalue())
    finally:
        sys.argv = argv
        gc.collect()  # an error holds frames, and they the run directory's lock and the store
