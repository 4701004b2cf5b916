"""A notice board in the rendezvous store, on which ranks exchange messages outside of collectives: failures, requests to stop,
and progress.

If the store's host has stopped or is unreachable, a call to the store never returns and cannot be cancelled. So the board has
a connection of its own in a thread of its own, and callers wait for the thread for a limited time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

T = TypeVar("T")


class StoreUnreachable(RuntimeError):
    """The rendezvous store did not answer in time, or the connection to it was lost."""


class Noticeboard:
    """A connection to the store, used by one thread."""

    def __init__(self, store: Store):
        self.store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.questions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True, name="noticeboard").start()

    def ask(self, question: Callable[[Store], T], seconds: float) -> T:
        """Call ``question(store)`` in the board's thread and return its result.

        Raises:
            StoreUnreachable: if there is no result within ``seconds``, or the call raises an error.
        """
        answers: list[T] = []
        errors: list[Exception] = []
        answered = threading.Event()

        def look() -> None:
            try:
                answers.append(question(self.store))
            except Exception as error:  # raised again in the caller's thread
                errors.append(error)
            answered.set()

        self.questions.put(look)
        if not answered.wait(seconds):
            raise StoreUnreachable(f"the rendezvous store did not answer within {seconds:g} s")
        if errors:
            raise StoreUnreachable(f"the connection to the rendezvous store failed: {errors[0]}") from errors[0]
        return answers[0]

    def close(self) -> None:
        """End the thread after it has answered all earlier calls."""
        self.questions.put(None)

    def _answer(self) -> None:
        while (question := self.questions.get()) is not None:
            question()


def texts(store: Store, keys: list[str]) -> list[str | None]:
    """The value of each key, or None if it is not set."""
    return [store.get(key).decode() if store.check([key]) else None for key in keys]
