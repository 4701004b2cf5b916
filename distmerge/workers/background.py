"""A thread that runs pending reduces while training goes on."""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue

import torch

LEAVING = 10.0
"""Seconds that a process which leaves with messages in flight waits for them. Python aborts a process that ends while one of
its threads is inside a wait of torch's."""

_running: weakref.WeakKeyDictionary[threading.Thread, SimpleQueue[Job | None]] = weakref.WeakKeyDictionary()


class Job:
    """The stages of one reduce, in progress.

    Attributes:
        error: what a stage raised; no stage runs after it.
    """

    def __init__(self, stages: Iterator[None]):
        self._stages = stages
        self._first, self._all = threading.Event(), threading.Event()
        self.error: BaseException | None = None

    def step(self) -> bool:
        """Run the next stage; whether there may be another."""
        try:
            next(self._stages)
        except StopIteration:
            self._all.set()
        except BaseException as error:  # it is raised again where the reduce is waited for
            self.error = error
            self._all.set()
        self._first.set()
        return not self._all.is_set()

    def wait_for_first(self) -> None:
        """Wait for the first stage, which depends on this rank alone."""
        self._first.wait()

    def wait(self) -> float:
        """Wait for all stages; the seconds that this took. What one of them raised is raised here."""
        began = time.perf_counter()
        self._all.wait()
        if self.error is not None:
            raise self.error
        return time.perf_counter() - began


class StageThread:
    """Runs the stages of jobs in a thread of its own, one stage of each job in turn.

    If two buckets are sent after each other, the second one is encoded before the thread waits for the first one to arrive.
    When the object is dropped, the thread ends after the jobs that were begun, since other workers wait for its part in them.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        thread = threading.Thread(target=work, args=(self._jobs,), daemon=True, name="exchange")
        thread.start()
        _running[thread] = self._jobs
        weakref.finalize(self, self._jobs.put, None)

    def begin(self, stages: Iterator[None]) -> Job:
        """Run the stages in the thread; the caller must not touch what they use until it has waited for them."""
        job = Job(stages)
        self._jobs.put(job)
        return job


@torch.no_grad()
def work(jobs: SimpleQueue[Job | None]) -> None:
    """Run jobs until None arrives and all of them are done."""
    begun: deque[Job] = deque()
    ending = False
    while begun or not ending:
        while not ending and (not begun or not jobs.empty()):
            job = jobs.get()
            ending = job is None
            if job is not None:
                begun.append(job)
        if begun and begun[0].step():
            begun.rotate(-1)
        elif begun:
            begun.popleft()


@atexit.register
def leave() -> None:
    """Wait until no thread is inside torch."""
    for thread, jobs in list(_running.items()):
        jobs.put(None)
        thread.join(LEAVING)
