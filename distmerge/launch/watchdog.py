"""Finds the rank that has stopped: after a failed collective, and by a watchdog over the progress of a run.

When a collective fails, each rank that is still alive posts a note on the notice board, so a rank without a note has died or
hangs. If the board itself does not answer, its host has died. A rank that was only late finds the others gone when it reaches
the collective, and posts its note after theirs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from distmerge.launch.noticeboard import Noticeboard, StoreUnreachable, texts

PATIENCE_SECONDS = 10.0
"""How long a rank waits for the others' notes after a failed collective."""

STOP_REQUEST = "leave"
"""Key on the notice board, set when the job was asked to stop. A failed collective is then nobody's fault."""

WATCHDOG_ENDED = "watchdog"
"""Key on the notice board, set when a watchdog ends the job."""


class Ranks(Protocol):
    """The attributes of a :class:`~distmerge.mesh.Mesh` that are needed here."""

    rank: int
    world: int
    shards: int
    board: Noticeboard
    timeout_seconds: float


def verdict(ranks: Ranks, waited: bool) -> str | None:
    """Which ranks have caused a collective to fail.

    Args:
        waited: whether the collective timed out on this rank, rather than failing because a connection was closed.

    Returns:
        a phrase that names the ranks. None if all ranks failed at the same time, so that the error lies elsewhere; an empty
        string if the job was asked to stop or a watchdog ends it, which has been reported.
    """
    try:
        kind = "waited" if waited else "cut off"
        order = ranks.board.ask(lambda store: store.add("failures", 1), PATIENCE_SECONDS)
        ranks.board.ask(lambda store: store.set(f"failed/{ranks.rank}", f"{order} {kind}"), PATIENCE_SECONDS)
        keys = [f"failed/{rank}" for rank in range(ranks.world)]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            reported, *notes = ranks.board.ask(
                lambda store: [store.check([STOP_REQUEST]) or store.check([WATCHDOG_ENDED]), *texts(store, keys)],
                PATIENCE_SECONDS,
            )
            if reported:
                return ""
            if None not in notes or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except StoreUnreachable:
        return f"{store_host(ranks)} died or stopped answering"
    missing = [rank for rank, note in enumerate(notes) if note is None]
    if missing:
        return f"{names(ranks, missing)} died or stopped answering"
    kinds = [str(note).partition(" ")[2] for note in notes]
    if "waited" not in kinds:
        return None
    late = [(int(str(note).split()[0]), rank) for rank, note in enumerate(notes) if kinds[rank] == "cut off"]
    limit = f"mesh.timeout_seconds = {ranks.timeout_seconds:g}"
    if not late:
        return f"all ranks waited for each other for {limit}: one of them, or the network, is too slow"
    return f"{names(ranks, [max(late)[1]])} was late by more than {limit}"


def names(ranks: Ranks, which: Iterable[int]) -> str:
    return "rank " + ", ".join(f"{rank} (worker {rank // ranks.shards})" for rank in which)


def store_host(ranks: Ranks) -> str:
    """The process that hosts the store, and with it the notice board."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"the launcher at {where}, which holds the rendezvous store,"
    return f"{names(ranks, [0])}, which holds the rendezvous store at {where},"


class Progress(NamedTuple):
    """A rank's progress as posted on the notice board.

    Attributes:
        marks: number of steps, evaluations and commits that the rank has completed.
        beats: number of heartbeats of the rank's watchdog.
        what: what the rank has completed last.
    """

    marks: int
    beats: int
    what: str


class Watchdog:
    """Ends the job if no step, evaluation or commit is completed for ``seconds``.

    Every rank has a watchdog, which also posts the rank's progress. It starts after the first step, since preparing data and
    compiling may take any time.

    Args:
        seconds: the limit; None for no watchdog.
    """

    def __init__(self, ranks: Ranks, seconds: float | None):
        self.ranks, self.seconds = ranks, seconds
        self.marks, self.what, self.when = 0, "", 0.0
        self.beats = 0
        self.stopped = threading.Event()

    def mark(self, what: str) -> None:
        """Record that ``what`` is completed. All ranks call it at the same points of the run."""
        self.marks, self.what, self.when = self.marks + 1, what, time.monotonic()
        if self.marks == 1 and self.seconds is not None:
            threading.Thread(target=self._watch, args=(self.seconds,), daemon=True, name="watchdog").start()

    def stop(self) -> None:
        self.stopped.set()

    def _watch(self, seconds: float) -> None:
        pause = min(10.0, seconds / 5)
        while not self.stopped.wait(pause):
            self._beat(seconds)
            if time.monotonic() - self.when <= seconds:
                continue
            try:
                slowest = self._slowest(pause)
                first = self.ranks.board.ask(lambda store: store.add(WATCHDOG_ENDED, 1), PATIENCE_SECONDS) == 1
            except StoreUnreachable:
                slowest, first = f"no answer from {store_host(self.ranks).rstrip(',')}", True
            if time.monotonic() - self.when > seconds and not self.stopped.is_set():
                end(f"no progress for mesh.watchdog_seconds = {seconds:g}: {slowest}" if first else None)

    def _beat(self, patience_seconds: float) -> None:
        """Post this rank's progress, which is also its heartbeat."""
        self.beats += 1
        note = f"{self.marks} {self.beats} {self.what}"
        with contextlib.suppress(StoreUnreachable):
            self.ranks.board.ask(lambda store: store.set(f"progress/{self.ranks.rank}", note), patience_seconds)

    def _slowest(self, pause: float) -> str:
        """The ranks that hold up the others: those without a heartbeat if there are any, else those that are furthest
        behind."""
        before = self._seen()
        for _ in range(3):
            time.sleep(pause)
            self._beat(PATIENCE_SECONDS)
        after = self._seen()
        silent = [rank for rank, (old, new) in enumerate(zip(before, after, strict=True)) if new is None or old == new]
        if silent:
            return f"no heartbeat from {names(self.ranks, silent)}"
        seen = [progress for progress in after if progress is not None]
        least = min(progress.marks for progress in seen)
        behind = [rank for rank, progress in enumerate(seen) if progress.marks == least]
        who = "all ranks" if len(behind) == self.ranks.world else names(self.ranks, behind)
        return f"{who} stopped after {seen[behind[0]].what}"

    def _seen(self) -> list[Progress | None]:
        keys = [f"progress/{rank}" for rank in range(self.ranks.world)]
        notes = self.ranks.board.ask(lambda store: texts(store, keys), PATIENCE_SECONDS)
        parts = [None if note is None else note.split(" ", 2) for note in notes]
        return [None if part is None else Progress(int(part[0]), int(part[1]), part[2]) for part in parts]


def end(reason: str | None) -> None:
    """End this rank's process from a thread.

    Args:
        reason: is printed; None if another rank prints it.
    """
    if reason is not None:
        os.write(2, f"error: {reason}; start the same command again to resume\n".encode())
    sys.stdout.flush()
    os._exit(1)
