"""Hashes the files that a merge reads and writes, just behind the merge, while their pages are still in memory.

A file is identified by its SHA-256. Where the record that was published with a file has its SHA-256 and also its XXH128 (XXH3
with 128 bits, https://xxhash.com, which runs at the speed of memory), checking the second is enough to show that the file is
undamaged. Neither hash protects against forgery: who forges a file can forge its record as well. Imports no torch.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.files.manifest import HASH_NAMES, HASHES

HEAD_START_BYTES = 3 << 29
"""What one core hashes with SHA-256 in about a second, the time that importing torch takes. Inputs of this size stay in the
page cache until the merge reads them."""

PIECE_BYTES = 1 << 28

NAMES = {"bytes": "size"} | HASH_NAMES


class Digests:
    """Computes sizes and hashes of files on threads of its own.

    Args:
        threads: how many threads hash.
        recorded: the entries of files in published records, ``{"bytes", "sha256"}`` and perhaps ``"xxh128"``. A file that
            differs from its entry is an error.
    """

    def __init__(self, threads: int, recorded: Mapping[Path, dict[str, Any]] | None = None):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="digest")
        self._recorded = recorded or {}
        self._followers: dict[Path, Follower] = {}
        self._waiting: list[Future[None]] = []
        self._stop = threading.Event()

    def begin(self, inputs: Iterable[Path]) -> None:
        """Start hashing the first ``HEAD_START_BYTES`` of the inputs on one thread, before the merge reads them."""
        left = HEAD_START_BYTES
        ahead: list[tuple[Follower, int]] = []
        for path in inputs:
            follower = self._follower(path)
            ahead.append((follower, min(left, follower.bytes)))
            left -= ahead[-1][1]
        self._waiting.append(self._pool.submit(self._run_ahead, ahead))

    def _follower(self, path: Path) -> Follower:
        if path not in self._followers:
            kind = "xxh128" if "xxh128" in self._recorded.get(path, {}) else "sha256"
            self._followers[path] = Follower(path, kind)
        return self._followers[path]

    def _run_ahead(self, ahead: list[tuple[Follower, int]]) -> None:
        for follower, stop in ahead:
            for to in range(PIECE_BYTES, stop + PIECE_BYTES, PIECE_BYTES):
                if self._stop.is_set():
                    return
                follower.follow(min(to, stop))

    def advance(self, path: Path, to: int | None = None) -> None:
        """Hash the file up to byte ``to``, in the background; all of it, if ``to`` is None. These bytes must be final."""
        self._waiting = [future for future in self._waiting if not future.done() or future.result()]
        self._waiting.append(self._pool.submit(self._follower(path).follow, to))

    def close(self) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def finish(self) -> dict[Path, dict[str, Any]]:
        """Hash the rest of every file named so far. Returns size and SHA-256 of each.

        Raises:
            UserError: naming the first file that differs from its record.
        """
        for path in self._followers:
            self.advance(path)
        for future in self._waiting:
            future.result()
        self.close()
        return {path: self._entry(path, follower) for path, follower in self._followers.items()}

    def _entry(self, path: Path, follower: Follower) -> dict[str, Any]:
        found = follower.result()
        said = self._recorded.get(path, found)
        for key, value in found.items():
            if said.get(key) != value:
                raise UserError(f"{path} does not have the {NAMES[key]} in the record beside it; nothing was published")
        return {"bytes": said["bytes"], "sha256": said["sha256"]}


class Follower:
    """The running hash of one file, from its beginning up to where it was told to follow."""

    def __init__(self, path: Path, kind: str):
        self._kind, self._digest, self._at, self._lock = kind, HASHES[kind](), 0, threading.Lock()
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @property
    def bytes(self) -> int:
        return len(self._map)

    def follow(self, to: int | None) -> None:
        with self._lock, memoryview(self._map) as view:
            stop = len(view) if to is None else to
            if stop > self._at:
                self._digest.update(view[self._at : stop])
                self._at = stop

    def result(self) -> dict[str, Any]:
        assert self._at == len(self._map)
        return {"bytes": self._at, self._kind: self._digest.hexdigest()}
