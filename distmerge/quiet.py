"""Keeps standard output clean for commands whose output programs read: what libraries print goes to standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A context in which standard output is redirected to standard error, for Python, C code and child processes.

    A logger that a library creates for ``sys.stdout`` in this context keeps writing to standard error afterwards.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
