"""A disk that fails: every system call that touches a directory is counted, and one of them goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

CALLS = ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir")

KILLS = ("kill", "tear", "zeros", "undo")
"""What the crash does to what was not yet synced: nothing (a killed process); files keep half of it; files keep their
length and lose their bytes; renames are forgotten."""

ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}


class Killed(BaseException):
    """The process is dead: no cleanup that catches errors may see it."""


class FaultyDisk:
    """Lets call number ``at`` that touches ``root`` fail as ``fault`` says; with no fault it only counts.

    After a kill every further call is refused too: what a dead process cannot do must not happen.
    """

    def __init__(self, root: Path, fault: str | None = None, at: int = -1):
        self.root, self.fault, self.at = str(root), fault, at
        self.calls: list[str] = []
        self.dead = False
        self.real = {name: getattr(os, name) for name in CALLS}
        self.paths: dict[int, str] = {}
        self.unsynced: dict[str, int] = {}  # file -> bytes that are synced
        self.renames: list[tuple[str, str]] = []

    def __enter__(self) -> FaultyDisk:
        for name in CALLS:
            setattr(os, name, self._wrapper(name))
        return self

    def __exit__(self, *error: object) -> None:
        for name, real in self.real.items():
            setattr(os, name, real)
        for descriptor in self.paths:
            self.real["close"](descriptor)
        if self.dead:
            self._crash()

    def _wrapper(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            path = self._path(name, arguments)
            if path is None or not path.startswith(self.root):
                return self.real[name](*arguments, **options)
            self._strike(name, path, arguments)
            result = self.real[name](*arguments, **options)
            self._note(name, path, arguments, result)
            return result

        return call

    def _path(self, name: str, arguments: tuple[Any, ...]) -> str | None:
        if name in ("write", "fsync", "close"):
            return self.paths.get(arguments[0])
        return os.fspath(arguments[0])

    def _strike(self, name: str, path: str, arguments: tuple[Any, ...]) -> None:
        if self.dead:
            raise Killed
        index = len(self.calls)
        self.calls.append(name)
        if index != self.at or self.fault is None:
            return
        if self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]), path)
        if name == "write" and self.fault == "tear":
            self.real["write"](arguments[0], arguments[1][: len(arguments[1]) // 2])
        self.dead = True
        raise Killed

    def _note(self, name: str, path: str, arguments: tuple[Any, ...], result: Any) -> None:
        match name:
            case "open":
                self.paths[result] = path
            case "write":
                self.unsynced.setdefault(path, 0)
            case "fsync":
                self.unsynced.pop(path, None)
                self.renames = [(a, b) for a, b in self.renames if os.path.dirname(b) != path]
            case "close":
                del self.paths[arguments[0]]
            case "rename":
                self.renames.append((path, os.fspath(arguments[1])))

    def _crash(self) -> None:
        for path, synced in self.unsynced.items():
            if os.path.exists(path):
                size = os.path.getsize(path)
                if self.fault == "tear":
                    os.truncate(path, synced + (size - synced) // 2)
                if self.fault == "zeros":
                    Path(path).write_bytes(b"\0" * size)
        if self.fault == "undo":
            for old, new in reversed(self.renames):
                if os.path.exists(new) and not os.path.exists(old):
                    shutil.move(new, old)
