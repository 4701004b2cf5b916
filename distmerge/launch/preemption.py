"""Leaving in time: when a scheduler, or Ctrl-C, tells any rank to leave, all commit a checkpoint at one step and leave.

Workers are at different steps when a signal comes, and their main threads may wait in collectives for each other. So a thread
of each rank looks at the board a few times a second. The first rank that is told puts a note there; at that, each rank's thread
says which step is its last without an agreement: the one in progress. The main thread stops behind that step until all ranks
have said so, and then goes on to the largest of them, where all commit. No rank can be beyond it, and none waits for another
that waits for it: threads answer while main threads are in a collective. Before the loop, and after its last commit, there is
nothing to keep, and the ranks leave at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from distmerge.launch.interrupts import EARS, REQUEUE, Listener, say
from distmerge.launch.noticeboard import Silent, texts
from distmerge.launch.watchdog import LEAVE
from distmerge.mesh import Mesh

LOOK_SECONDS = 0.25
"""Pause between two looks at the board."""

NOTHING = "nothing"
"""A rank's answer where it has nothing to keep: it has left."""


class Preemption:
    """Whether this job has to leave, asked once per step.

    Args:
        steps: of the whole run: who comes to its end has nothing to leave for.
    """

    def __init__(self, mesh: Mesh, steps: int):
        self.mesh, self.steps = mesh, steps
        self.number = 0  # of the signal, once it is known
        self.heard = 0.0  # when this rank was told by a signal of its own
        self.completed: int | None = None  # steps; None while there is nothing to keep
        self.last: int | None = None  # the step behind which this rank waits for the others
        self.target: int | None = None
        self.lock = threading.Lock()
        self.told, self.closed = threading.Event(), threading.Event()
        EARS.install()
        self.before: Listener = EARS.hear(self._tell)
        self.thread = threading.Thread(target=self._look, daemon=True, name="preemption")
        self.thread.start()

    @property
    def status(self) -> int:
        """The exit status of a job that was told to leave."""
        return REQUEUE if self.number in (signal.SIGTERM, signal.SIGUSR1, 0) else 128 + self.number

    def begin(self, step: int) -> None:
        """From here on a checkpoint is committed before the ranks leave."""
        with self.lock:
            self.completed = step

    def due(self, step: int) -> bool:
        """Whether to commit and leave after ``step``: the same on all ranks, which it may wait for once."""
        with self.lock:
            self.completed = step
            if self.last is None or step < self.last:
                return False
        if self.target is None:
            self.target = self._agree()
        return self.target <= step < self.steps

    def end(self) -> None:
        """From here on the ranks leave at once: all is committed."""
        with self.lock:
            self.completed = None
        if self.number:
            self._leave()

    def close(self) -> None:
        """Give the signals back."""
        self.closed.set()
        self.told.set()  # for the thread to look
        EARS.hear(self.before)

    def _tell(self, number: int) -> None:
        """In the thread that hears signals. A second Ctrl-C leaves at once; a scheduler may send its signal twice."""
        if self.heard and number == signal.SIGINT and time.monotonic() - self.heard > 1.0:
            self._leave()
        if not self.number:
            self.number = number
        self.heard = self.heard or time.monotonic()
        self.told.set()

    def _look(self) -> None:
        """The thread: waits for a signal of this rank or for a note of another, and answers it."""
        board, alone = self.mesh.board, self.mesh.world == 1
        try:
            while not self.closed.is_set():
                self.told.wait(None if alone else LOOK_SECONDS)
                if self.closed.is_set():
                    return
                if self.told.is_set() or board.ask(lambda store: store.check([LEAVE]), self.mesh.timeout_seconds):
                    break
            else:
                return
            if not alone:
                self.number = int(board.ask(self._note, self.mesh.timeout_seconds))
            with self.lock:
                if self.completed is not None:
                    self.last = min(self.completed + 1, self.steps)
            answer = NOTHING if self.last is None else str(self.last)
            if not alone:
                board.ask(lambda store: store.set(f"{LEAVE}/{self.mesh.rank}", answer), self.mesh.timeout_seconds)
            if self.last is None:
                self._let_others_look()
                self._leave()
        except Silent:
            return  # its host is gone, which the next collective tells

    def _note(self, store: Any) -> bytes:
        """The note that tells all to leave: the first signal's number."""
        return store.compare_set(LEAVE, "", str(int(self.number)))

    def _let_others_look(self) -> None:
        """Rank 0 may hold the store: it stays for a moment, until the others have read the note."""
        keys = [f"{LEAVE}/{rank}" for rank in range(self.mesh.world)]
        deadline = time.monotonic() + 8 * LOOK_SECONDS
        while self.mesh.leads and self.mesh.world > 1 and time.monotonic() < deadline:
            if None not in self.mesh.board.ask(lambda store: texts(store, keys), LOOK_SECONDS):
                return
            time.sleep(LOOK_SECONDS / 5)

    def _agree(self) -> int:
        """The step at which all ranks leave, once all have said theirs."""
        if self.mesh.world == 1:
            assert self.last is not None
            return self.last
        keys = [f"{LEAVE}/{rank}" for rank in range(self.mesh.world)]
        deadline = time.monotonic() + self.mesh.timeout_seconds
        while None in (answers := self.mesh.board.ask(lambda store: texts(store, keys), self.mesh.timeout_seconds)):
            if time.monotonic() > deadline:
                raise Silent("a rank did not say when it can leave")
            time.sleep(0.02)
        if NOTHING in answers:  # it has gone, and no checkpoint can be committed without it
            self._leave()
        return max(int(answer) for answer in answers if answer is not None)

    def _leave(self) -> None:
        self.notify_agent()
        if self.mesh.leads:
            name = signal.Signals(self.number).name
            say(f"interrupted by {name}; start the same command again to go on from the newest checkpoint")
        os._exit(self.status)

    def notify_agent(self) -> None:
        """Another node's agent was told: this node's would take the ranks that leave for failed ones, and start them again."""
        several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
        if several and not self.heard and os.environ.get("LOCAL_RANK") == "0":
            os.kill(os.getppid(), signal.SIGTERM)
