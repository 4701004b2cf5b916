"""A disk that fails: every system call that touches a directory is counted, and one of them goes wrong."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

from distmerge.files import atomic

BY_DESCRIPTOR = ("write", "pwrite", "ftruncate", "fsync", "fdatasync", "close")
CALLS = (*BY_DESCRIPTOR, "open", "mkdir", "rename", "unlink", "rmdir")

KILLS = ("kill", "tear", "zeros", "undo")
"""What the crash does to what was not yet synced: nothing (a killed process); files keep half of it; files keep their
length and lose their bytes; renames are forgotten."""

ERRORS = {"enospc": errno.ENOSPC, "eio": errno.EIO}


class Killed(BaseException):
    """The process is dead: no cleanup that catches errors may see it."""


class FaultyDisk:
    """Lets call number ``at`` that touches ``root`` fail as ``fault`` says; with no fault it only counts.

    After a kill every further call is refused too: what a dead process cannot do must not happen. Files that others' code
    writes without these calls, such as safetensors', count as unsynced until somebody syncs them.
    """

    def __init__(self, root: Path, fault: str | None = None, at: int = -1):
        self.root, self.fault, self.at = str(root), fault, at
        self.calls: list[str] = []
        self.dead = False
        self.real = {name: getattr(os, name) for name in CALLS}
        self.paths: dict[int, str] = {}
        self.synced: dict[int, int] = {}  # file, by its inode -> bytes of it that are on the disk
        self.renames: list[tuple[str, str]] = []
        self.replaced: dict[str, bytes] = {}  # by the name, what stood there before a rename that may yet be forgotten
        self.swap = atomic.swap

    def __enter__(self) -> FaultyDisk:
        self.synced = {path.stat().st_ino: path.stat().st_size for path in self._files()}
        for name in CALLS:
            setattr(os, name, self._wrapper(name))
        atomic.swap = self._swap
        return self

    def __exit__(self, *error: object) -> None:
        for name, real in self.real.items():
            setattr(os, name, real)
        atomic.swap = self.swap
        nowhere = self.real["open"](os.devnull, os.O_WRONLY)
        for descriptor in self.paths:  # the file is let go; the number stays its owner's, who may still close it
            os.dup2(nowhere, descriptor, inheritable=False)
        self.real["close"](nowhere)
        if self.dead:
            self._crash()

    def _wrapper(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            path = self._path(name, arguments)
            if path is None or not path.startswith(self.root):
                return self.real[name](*arguments, **options)
            self._strike(name, path, arguments)
            if name == "rename" and os.path.isfile(arguments[1]):
                self.replaced.setdefault(os.fspath(arguments[1]), Path(arguments[1]).read_bytes())
            result = self.real[name](*arguments, **options)
            self._note(name, path, arguments, result)
            return result

        return call

    def _path(self, name: str, arguments: tuple[Any, ...]) -> str | None:
        if name in BY_DESCRIPTOR:
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
            case "fsync" | "fdatasync":
                found = os.fstat(arguments[0])
                self.synced[found.st_ino] = found.st_size
                self.renames = [(a, b) for a, b in self.renames if os.path.dirname(b) != path]
                self.replaced = {name: old for name, old in self.replaced.items() if os.path.dirname(name) != path}
            case "close":
                del self.paths[arguments[0]]
            case "rename":
                self.renames.append((path, os.fspath(arguments[1])))

    def _swap(self, a: Path, b: Path) -> bool:
        """The exchange of two names, which is a call of the system as well."""
        self._strike("exchange", str(b), ())
        self.renames += [(str(a), str(b))]
        return self.swap(a, b)

    def _files(self) -> list[Path]:
        return [path for path in Path(self.root).rglob("*") if path.is_file() and path.name != "lock"]

    def _crash(self) -> None:
        for path in self._files():
            size, synced = path.stat().st_size, self.synced.get(path.stat().st_ino, 0)
            if size > synced and self.fault == "tear":
                os.truncate(path, synced + (size - synced) // 2)
            if size > synced and self.fault == "zeros":
                path.write_bytes(path.read_bytes()[:synced] + b"\0" * (size - synced))
        if self.fault == "undo":
            for old, new in reversed(self.renames):
                if os.path.exists(new) and os.path.exists(old):
                    self.swap(Path(new), Path(old))
                elif os.path.exists(new):
                    shutil.move(new, old)
            for name, content in self.replaced.items():
                Path(name).write_bytes(content)
