"""Preemption: when a signal from a scheduler or from Ctrl-C asks any rank to stop, all ranks commit a checkpoint of the same
step and exit.

Workers may be at different steps when the signal arrives, and their main threads may be waiting for each other in collectives.
So a thread of each rank polls the notice board several times a second, and the ranks agree on a step as follows:

1. The first rank that receives a signal posts a request to stop.
2. Each rank's thread sees the request and posts the number of the step that its main thread is working on. The main thread
   waits after that step until all ranks have posted theirs.
3. All ranks continue up to the largest posted step, commit a checkpoint there and exit.

For example, ranks that are working on steps 41, 42 and 41 all commit step 42. No rank can have passed the agreed step, and
there is no deadlock, since the threads post while the main threads are in collectives. Before the training loop and after its
last commit there is nothing to save, so the ranks exit at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from distmerge.launch.interrupts import REQUEUE, SIGNAL_THREAD, Callback, say
from distmerge.launch.noticeboard import StoreUnreachable, texts
from distmerge.launch.watchdog import STOP_REQUEST
from distmerge.mesh import Mesh

POLL_SECONDS = 0.25
"""Time between two looks at the notice board."""

NOTHING_TO_KEEP = "nothing"
"""Posted in place of a step by a rank that has nothing to save and exits."""


class Preemption:
    """Watches for requests to stop. The training loop asks :meth:`due` once per step.

    Args:
        steps: number of steps of the whole run. A request that leads to the last step is ignored, since the run ends anyway.
    """

    def __init__(self, mesh: Mesh, steps: int):
        self.mesh, self.steps = mesh, steps
        self.number = 0  # the signal's number, once it is known
        self.signal_time = 0.0  # when this rank itself received a signal (time.monotonic)
        self.completed: int | None = None  # completed steps; None while there is nothing to save
        self.last: int | None = None  # the step after which this rank waits for the others' steps
        self.target: int | None = None  # the agreed step
        self.lock = threading.Lock()
        self.signalled, self.closed = threading.Event(), threading.Event()
        SIGNAL_THREAD.install()
        self.before: Callback = SIGNAL_THREAD.set_callback(self._on_signal)
        self.thread = threading.Thread(target=self._watch, daemon=True, name="preemption")
        self.thread.start()

    @property
    def status(self) -> int:
        """The exit status of a job that was asked to stop."""
        return REQUEUE if self.number in (signal.SIGTERM, signal.SIGUSR1, 0) else 128 + self.number

    def begin(self, step: int) -> None:
        """From now on, commit a checkpoint before stopping."""
        with self.lock:
            self.completed = step

    def due(self, step: int) -> bool:
        """Whether to commit a checkpoint after ``step`` and stop. All ranks get the same answer, for which they wait for each
        other once."""
        with self.lock:
            self.completed = step
            if self.last is None or step < self.last:
                return False
        if self.target is None:
            self.target = self._agree_on_step()
        return self.target <= step < self.steps

    def end(self) -> None:
        """From now on, exit at once on a signal: everything is committed."""
        with self.lock:
            self.completed = None
        if self.number:
            self._exit()

    def close(self) -> None:
        """Stop watching and restore the previous signal callback."""
        self.closed.set()
        self.signalled.set()  # wakes the thread
        SIGNAL_THREAD.set_callback(self.before)

    def _on_signal(self, number: int) -> None:
        """Runs in the signal thread. A second Ctrl-C exits at once; a second signal of a scheduler does not."""
        if self.signal_time and number == signal.SIGINT and time.monotonic() - self.signal_time > 1.0:
            self._exit()
        if not self.number:
            self.number = number
        self.signal_time = self.signal_time or time.monotonic()
        self.signalled.set()

    def _watch(self) -> None:
        """Runs in a thread: waits for a signal of this rank or a request of another, and posts this rank's step."""
        board, alone = self.mesh.board, self.mesh.world == 1
        try:
            while not self.closed.is_set():
                self.signalled.wait(None if alone else POLL_SECONDS)
                if self.closed.is_set():
                    return
                if self.signalled.is_set() or board.ask(lambda store: store.check([STOP_REQUEST]), self.mesh.timeout_seconds):
                    break
            else:
                return
            if not alone:
                self.number = int(board.ask(self._request_stop, self.mesh.timeout_seconds))
            with self.lock:
                if self.completed is not None:
                    self.last = min(self.completed + 1, self.steps)
            answer = NOTHING_TO_KEEP if self.last is None else str(self.last)
            if not alone:
                board.ask(lambda store: store.set(f"{STOP_REQUEST}/{self.mesh.rank}", answer), self.mesh.timeout_seconds)
            if self.last is None:
                self._wait_for_readers()
                self._exit()
        except StoreUnreachable:
            return  # the store's host has died, so the next collective fails and reports it

    def _request_stop(self, store: Any) -> bytes:
        """Post the request to stop unless another rank has, and return the number of the signal that was first."""
        return store.compare_set(STOP_REQUEST, "", str(int(self.number)))

    def _wait_for_readers(self) -> None:
        """Keep rank 0 alive for a moment until the others have read the request, since it may host the store."""
        keys = [f"{STOP_REQUEST}/{rank}" for rank in range(self.mesh.world)]
        deadline = time.monotonic() + 8 * POLL_SECONDS
        while self.mesh.leads and self.mesh.world > 1 and time.monotonic() < deadline:
            if None not in self.mesh.board.ask(lambda store: texts(store, keys), POLL_SECONDS):
                return
            time.sleep(POLL_SECONDS / 5)

    def _agree_on_step(self) -> int:
        """Wait until all ranks have posted their steps and return the largest, after which all stop."""
        if self.mesh.world == 1:
            assert self.last is not None
            return self.last
        keys = [f"{STOP_REQUEST}/{rank}" for rank in range(self.mesh.world)]
        deadline = time.monotonic() + self.mesh.timeout_seconds
        while None in (answers := self.mesh.board.ask(lambda store: texts(store, keys), self.mesh.timeout_seconds)):
            if time.monotonic() > deadline:
                raise StoreUnreachable("a rank did not post the step after which it can stop")
            time.sleep(0.02)
        if NOTHING_TO_KEEP in answers:  # that rank has exited, and a checkpoint needs all ranks
            self._exit()
        return max(int(answer) for answer in answers if answer is not None)

    def _exit(self) -> None:
        self.notify_agent()
        if self.mesh.leads:
            name = signal.Signals(self.number).name
            say(f"interrupted by {name}; start the same command again to resume from the newest checkpoint")
        os._exit(self.status)

    def notify_agent(self) -> None:
        """Forward the signal to this node's torchrun agent if only another node received it. Otherwise this agent would take
        the exit of its ranks for a failure and restart them."""
        several = int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1
        if several and not self.signal_time and os.environ.get("LOCAL_RANK") == "0":
            os.kill(os.getppid(), signal.SIGTERM)
