"""SIGINT, SIGTERM, SIGUSR1 and SIGHUP, heard at any moment: during imports, and while the main thread waits in a collective.

Python runs a signal's handler only between two bytecodes of the main thread, which may sit in C for minutes. The interpreter's
own handler writes the signal's number into a pipe at once, though, and a thread reads it there. Until somebody else listens,
the process ends with one line: everything on disk is written so that it can be ended at any moment.

This module imports nothing heavy: it is loaded before everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

REQUEUE = 75
"""The exit status that asks to be started again: EX_TEMPFAIL of sysexits.h."""

LAUNCHED = "DISTMERGE_LAUNCHED"
"""The launcher's process in the environment of its ranks, where it is ours: it speaks for them when they are interrupted."""

RESUMED = ("train", "anneal", "experts", "merge", "ptm")
"""Verbs that go on where they were interrupted."""

Listener = Callable[[int], None]
"""Is called with the signal's number, in a thread."""


def status_of(number: int) -> int:
    """The exit status of a command that ends for a signal."""
    preempted = number in (signal.SIGTERM, signal.SIGUSR1)
    return REQUEUE if preempted and sys.argv[1:2] and sys.argv[1] in RESUMED else 128 + number


def end(number: int) -> None:
    """The default: one line, and the process ends here and now."""
    again = "; start the same command again to go on from what is kept" if sys.argv[1:2] and sys.argv[1] in RESUMED else ""
    say(f"interrupted by {signal.Signals(number).name}{again}")
    os._exit(status_of(number))


def say(line: str) -> None:
    """One line on standard error, from any thread: once for a machine's ranks, and by our launcher for its own."""
    if (LAUNCHED in os.environ and "RANK" in os.environ) or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    descriptor = EARS.stderr
    os.write(descriptor, (("\n" if os.isatty(descriptor) else "") + line + "\n").encode())  # the stream may be locked


class Ears:
    """The process's one listener for signals."""

    def __init__(self) -> None:
        self.listener: Listener = end
        self.installed = False
        self.stderr = 2  # where lines go: not to 2 while that is turned away

    def install(self) -> None:
        """Hear the signals from now on; in the main thread."""
        if self.installed or threading.current_thread() is not threading.main_thread():
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, ignore)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self.installed = True
        threading.Thread(target=self._listen, args=(reading,), daemon=True, name="signals").start()
        os.register_at_fork(after_in_child=self.forget)

    def _listen(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 64):
                if number in SIGNALS:
                    self.listener(number)

    def forget(self) -> None:
        """A forked child's signals are its own: they must not be heard here."""
        if self.installed:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            self.installed = False

    def take_back(self) -> None:
        """Undo other handlers: torch's agent leaves its own behind, which raise in the main thread."""
        if self.installed and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, ignore)

    @contextlib.contextmanager
    def without_stderr(self) -> Iterator[None]:
        """A stretch in which what C writes to standard error is dropped, since whoever calls it says it in a line."""
        sys.stderr.flush()
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        self.stderr = kept
        os.dup2(nowhere, 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            self.stderr = 2
            os.close(nowhere)
            os.close(kept)

    def hear(self, listener: Listener) -> Listener:
        """Let another one listen; the one before it."""
        before, self.listener = self.listener, listener
        return before


def ignore(number: int, frame: object) -> None:
    """The handler in Python does nothing: the thread has been told."""


EARS = Ears()
