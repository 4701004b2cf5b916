"""Who stopped: what survivors say of a collective that failed, and a watchdog over the progress of a run.

A rank that failed leaves a note on the board, so those without one died or stopped. Where the board itself is silent, its host
is gone. A rank that was only late finds the others gone when it comes, and leaves its note after theirs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterable
from typing import NamedTuple, Protocol

from distmerge.launch.noticeboard import Noticeboard, Silent, texts

PATIENCE_SECONDS = 10.0
"""How long a rank that failed waits for the others' notes."""

LEAVE = "leave"
"""Is on the board where the job was told to leave: then nobody is to blame."""

STOPPED = "watchdog"
"""Is on the board where the watchdog ends the job."""


class Ranks(Protocol):
    """What is known of the ranks: a :class:`~distmerge.mesh.Mesh`."""

    rank: int
    world: int
    shards: int
    board: Noticeboard
    timeout_seconds: float


def verdict(ranks: Ranks, waited: bool) -> str | None:
    """After a collective failed: which ranks are to blame, in words. None where all failed together; empty where it was told.

    Args:
        waited: whether this rank waited in vain, rather than finding the connection closed.
    """
    try:
        kind = "waited" if waited else "cut off"
        order = ranks.board.ask(lambda store: store.add("failures", 1), PATIENCE_SECONDS)
        ranks.board.ask(lambda store: store.set(f"failed/{ranks.rank}", f"{order} {kind}"), PATIENCE_SECONDS)
        keys = [f"failed/{rank}" for rank in range(ranks.world)]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            told, *notes = ranks.board.ask(
                lambda store: [store.check([LEAVE]) or store.check([STOPPED]), *texts(store, keys)], PATIENCE_SECONDS
            )
            if told:
                return ""
            if None not in notes or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    except Silent:
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
    """Who holds the store, and with it the board."""
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return f"the launcher at {where}, which holds the rendezvous store,"
    return f"{names(ranks, [0])}, which holds the rendezvous store at {where},"


class Progress(NamedTuple):
    """Attributes: how often the run moved on; how often its watchdog looked, which shows that it lives; what was done last."""

    marks: int
    beats: int
    what: str


class Watchdog:
    """Ends the job when its progress stops: no step, evaluation or commit for so many seconds after the first step.

    Every rank has one, which shows the others how far its rank is. What comes before the first step, such as preparing data
    and compiling, is not watched.
    """

    def __init__(self, ranks: Ranks, seconds: float | None):
        self.ranks, self.seconds = ranks, seconds
        self.marks, self.what, self.when = 0, "", 0.0
        self.beats = 0
        self.stopped = threading.Event()

    def mark(self, what: str) -> None:
        """The run moved on: ``what`` is done. Called on all ranks at the same places."""
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
                first = self.ranks.board.ask(lambda store: store.add(STOPPED, 1), PATIENCE_SECONDS) == 1
            except Silent:
                slowest, first = f"{store_host(self.ranks)} does not answer", True
            if time.monotonic() - self.when > seconds and not self.stopped.is_set():
                end(f"no progress for mesh.watchdog_seconds = {seconds:g}: {slowest}" if first else None)

    def _beat(self, patience_seconds: float) -> None:
        """Show how far this rank is, and that it lives."""
        self.beats += 1
        note = f"{self.marks} {self.beats} {self.what}"
        with contextlib.suppress(Silent):
            self.ranks.board.ask(lambda store: store.set(f"progress/{self.ranks.rank}", note), patience_seconds)

    def _slowest(self, pause: float) -> str:
        """Which ranks hold the others up: those that do not even show that they live, or those that are furthest behind."""
        before = self._seen()
        for _ in range(3):
            time.sleep(pause)
            self._beat(PATIENCE_SECONDS)
        after = self._seen()
        silent = [rank for rank, (old, new) in enumerate(zip(before, after, strict=True)) if new is None or old == new]
        if silent:
            return f"{names(self.ranks, silent)} does not show that it lives"
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
    """End this rank from a thread, with a line where it is the one that says why."""
    if reason is not None:
        os.write(2, f"error: {reason}; start the same command again to resume\n".encode())
    sys.stdout.flush()
    os._exit(1)
