"""A thread that runs pending reduces while training goes on."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterator
from queue import SimpleQueue

import torch


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

    def wait(self) -> None:
        """Wait for all stages. What one of them raised is raised here."""
        self._all.wait()
        if self.error is not None:
            raise self.error


class StageThread:
    """Runs the stages of jobs in a thread of its own, one stage of each job in turn.

    If two buckets are sent after each other, the second one is encoded before the thread waits for the first one to arrive.
    The thread ends with the object. It is a daemon, so a process that leaves while a peer is silent does not wait for it.
    """

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        threading.Thread(target=work, args=(self._jobs,), daemon=True, name="exchange").start()
        weakref.finalize(self, self._jobs.put, None)

    def begin(self, stages: Iterator[None]) -> Job:
        """Run the stages in the thread; the caller must not touch what they use until it has waited for them."""
        job = Job(stages)
        self._jobs.put(job)
        return job


@torch.no_grad()
def work(jobs: SimpleQueue[Job | None]) -> None:
    """Run jobs until None arrives."""
    begun: deque[Job] = deque()
    while True:
        while not begun or not jobs.empty():
            job = jobs.get()
            if job is None:
                return
            begun.append(job)
        job = begun.popleft()
        if job.step():
            begun.append(job)
