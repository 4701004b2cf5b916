"""Append-only records with one JSON object per line (JSON Lines), such as metrics.jsonl, which recover from any crash."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distmerge.files.atomic import sync, sync_directory, write_all


class Lines:
    """A record that is open for appending.

    Opening it cuts off what a crash left at its end: a torn line, bytes that are not text, a block of zeros that the file
    system allocated and never filled.

    Args:
        keep_bytes: keep at most this many bytes of an existing record; all of them, if None.

    Attributes:
        bytes: the length of the record.
        cut_bytes: how many of the bytes to be kept were cut off as damaged.

    Raises:
        OSError: naming the file.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None):
        self.path = path
        new = not path.exists()
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._closed = weakref.finalize(self, close, self.descriptor)  # also closes it after a run that failed
        kept = path.read_bytes()[:keep_bytes]
        self.bytes = sound_end(kept)
        self.cut_bytes = len(kept) - self.bytes
        os.ftruncate(self.descriptor, self.bytes)
        if new:
            sync_directory(path.parent)

    def append(self, line: dict[str, Any]) -> None:
        """Write a line to the operating system's cache; :meth:`sync` waits for the disk."""
        os.stat(self.path)  # raises if the file was deleted: writing would succeed, and the lines would be lost
        written = (json.dumps(line) + "\n").encode()
        write_all(self.descriptor, memoryview(written), self.path)
        self.bytes += len(written)

    def sync(self) -> int:
        """Wait until the whole record is on the disk. Returns its length in bytes."""
        sync(self.descriptor, self.path)
        return self.bytes

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines so far. A damaged line in the middle is skipped: those after it are still valid."""
        for line in self.path.read_bytes().split(b"\n"):
            if (found := parsed(line)) is not None:
                yield found

    def close(self) -> None:
        self._closed()


def close(descriptor: int) -> None:
    os.close(descriptor)


def sound_end(data: bytes) -> int:
    """The offset at which the last complete, valid line of a record ends."""
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if parsed(data[start : end - 1]) is not None:
            return end
        end = start
    return 0


def parsed(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object; None if it is not one."""
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
