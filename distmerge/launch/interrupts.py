"""Handles SIGINT, SIGTERM, SIGUSR1 and SIGHUP at any time, even during imports and while the main thread waits in a collective.

Python runs signal handlers only between two bytecodes of the main thread, which may be inside a C call for minutes. But the
interpreter's C handler writes the signal's number into a pipe at once (``signal.set_wakeup_fd``), and a thread reads it from
there. By default the process then ends with one line of output. This is safe at any time, since all files are written
atomically.

This module is imported before everything else, so it imports nothing heavy.
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
"""The exit status that asks the scheduler to start the job again: EX_TEMPFAIL of sysexits.h."""

LAUNCHED = "DISTMERGE_LAUNCHED"
"""Environment variable of the ranks that distmerge has launched: their launcher's process id. The launcher reports an interrupt
for all of them."""

RESUMABLE = ("train", "anneal", "experts", "merge", "ptm")
"""Commands that resume where they were interrupted."""

Callback = Callable[[int], None]
"""Called with the signal's number in the signal thread."""


def exit_status(number: int) -> int:
    """The exit status of a command that a signal has ended."""
    preempted = number in (signal.SIGTERM, signal.SIGUSR1)
    return REQUEUE if preempted and sys.argv[1:2] and sys.argv[1] in RESUMABLE else 128 + number


def end(number: int) -> None:
    """The default callback: print one line and end the process immediately."""
    again = "; start the same command again to resume" if sys.argv[1:2] and sys.argv[1] in RESUMABLE else ""
    say(f"interrupted by {signal.Signals(number).name}{again}")
    os._exit(exit_status(number))


def say(line: str) -> None:
    """Print a line to standard error, from any thread. Of a node's ranks only the first prints it, and none if distmerge has
    launched them, since the launcher then prints its own line."""
    if (LAUNCHED in os.environ and "RANK" in os.environ) or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    descriptor = SIGNAL_THREAD.stderr
    # Written directly, since the main thread may hold the lock of sys.stderr.
    os.write(descriptor, (("\n" if os.isatty(descriptor) else "") + line + "\n").encode())


class SignalThread:
    """Reads the process's signals in a thread and passes each to the current callback. There is one instance per process."""

    def __init__(self) -> None:
        self.callback: Callback = end
        self.installed = False
        self.stderr = 2  # the descriptor for messages; another one while descriptor 2 is redirected

    def install(self) -> None:
        """Start to handle signals. Does nothing outside of the main thread, where Python does not allow it."""
        if self.installed or threading.current_thread() is not threading.main_thread():
            return
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        for number in SIGNALS:
            signal.signal(number, ignore)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        self.installed = True
        threading.Thread(target=self._read, args=(reading,), daemon=True, name="signals").start()
        os.register_at_fork(after_in_child=self.reset_in_child)

    def _read(self, reading: int) -> None:
        while True:
            for number in os.read(reading, 64):
                if number in SIGNALS:
                    self.callback(number)

    def reset_in_child(self) -> None:
        """Restore the default handlers in a forked child: it shares the pipe, so its signals would arrive in the parent."""
        if self.installed:
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            self.installed = False

    def restore_handlers(self) -> None:
        """Replace handlers that others have installed: torch's agent leaves its own behind, which raise in the main thread."""
        if self.installed and threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, ignore)

    @contextlib.contextmanager
    def stderr_discarded(self) -> Iterator[None]:
        """A context in which output of C code to standard error is discarded, for callers that report errors themselves."""
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

    def set_callback(self, callback: Callback) -> Callback:
        """Set the callback and return the previous one."""
        before, self.callback = self.callback, callback
        return before


def ignore(number: int, frame: object) -> None:
    """The Python-level signal handler. It does nothing, since the signal thread has already received the number."""


SIGNAL_THREAD = SignalThread()
