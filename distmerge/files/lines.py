"""Records of one JSON object a line, such as metrics.jsonl: only ever added to, and sound again after any crash."""

from __future__ import annotations

import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distmerge.files.atomic import sync, sync_directory, write_all


class Lines:
    """A record that is open for more lines.

    What a crash left at its end is cut off: a line that was torn, bytes that are no text, a block of zeros that a disk
    allocated and never filled.

    Args:
        keep_bytes: of what is there, at most this much is kept; all of it, if it is None.

    Attributes:
        cut_bytes: of the part to be kept, how much was no sound line.

    Raises:
        OSError: naming the file.
    """

    def __init__(self, path: Path, keep_bytes: int | None = None):
        self.path = path
        new = not path.exists()
        self.descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._closed = weakref.finalize(self, close, self.descriptor)  # a run that failed holds no file
        kept = path.read_bytes()[:keep_bytes]
        self.bytes = sound_end(kept)
        self.cut_bytes = len(kept) - self.bytes
        os.ftruncate(self.descriptor, self.bytes)
        if new:
            sync_directory(path.parent)

    def append(self, line: dict[str, Any]) -> None:
        """Add a line. It is the operating system's now; :meth:`sync` waits for the disk."""
        os.stat(self.path)  # a file that was deleted would take every line, and nobody would ever read them
        written = (json.dumps(line) + "\n").encode()
        write_all(self.descriptor, memoryview(written), self.path)
        self.bytes += len(written)

    def sync(self) -> int:
        """The length of the record, all of which the disk has."""
        sync(self.descriptor, self.path)
        return self.bytes

    def read(self) -> Iterator[dict[str, Any]]:
        """The lines so far. One in the middle that is damaged is passed by: what follows it is as good as ever."""
        for line in self.path.read_bytes().split(b"\n"):
            if (found := parsed(line)) is not None:
                yield found

    def close(self) -> None:
        self._closed()


def close(descriptor: int) -> None:
    os.close(descriptor)


def sound_end(data: bytes) -> int:
    """Where the last whole, legible line of a record ends."""
    end = data.rfind(b"\n") + 1
    while end:
        start = data.rfind(b"\n", 0, end - 1) + 1
        if parsed(data[start : end - 1]) is not None:
            return end
        end = start
    return 0


def parsed(line: bytes) -> dict[str, Any] | None:
    """What a line says; None if it is no JSON object."""
    try:
        found = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
