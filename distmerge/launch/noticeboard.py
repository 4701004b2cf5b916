"""What ranks tell each other beside their collectives, through the rendezvous store: who failed, who leaves, who is how far.

A store whose host is stopped or unreachable never answers, and a call of it cannot be given up. So the board has a connection
of its own and a thread that talks on it: whoever asks waits for a limited time.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from torch.distributed.distributed_c10d import Store

T = TypeVar("T")


class Silent(RuntimeError):
    """The rendezvous store did not answer in time, or its host is gone."""


class Noticeboard:
    """A connection to the store, and the one thread that uses it."""

    def __init__(self, store: Store):
        self.store = store.clone()  # pyright: ignore[reportAttributeAccessIssue]
        self.questions: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        threading.Thread(target=self._answer, daemon=True, name="noticeboard").start()

    def ask(self, question: Callable[[Store], T], seconds: float) -> T:
        """What ``question`` answers for the store.

        Raises:
            Silent: without an answer in so many seconds.
        """
        answers: list[T] = []
        errors: list[Exception] = []
        answered = threading.Event()

        def look() -> None:
            try:
                answers.append(question(self.store))
            except Exception as error:  # raised where it was asked
                errors.append(error)
            answered.set()

        self.questions.put(look)
        if not answered.wait(seconds):
            raise Silent(f"the rendezvous store did not answer within {seconds:g} s")
        if errors:
            raise Silent(f"the rendezvous store is gone: {errors[0]}") from errors[0]
        return answers[0]

    def close(self) -> None:
        """End the thread, once all that was asked before is answered."""
        self.questions.put(None)

    def _answer(self) -> None:
        while (question := self.questions.get()) is not None:
            question()


def texts(store: Store, keys: list[str]) -> list[str | None]:
    """The values of those keys that are set."""
    return [store.get(key).decode() if store.check([key]) else None for key in keys]
