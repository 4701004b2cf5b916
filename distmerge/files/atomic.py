"""Atomic, durable writes: content is on the disk before it can be found under its final name, even after a power loss.

Every publication is built from these steps: a file is hashed while it is written and fsynced when it is closed; a small file,
or a whole directory, gets its final name by one rename; then the directory that holds the name is fsynced. Imports no torch.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
from pathlib import Path
from typing import Any

BUFFER_BYTES = 1 << 20


class DurableFile:
    """A new file: small writes are buffered, every byte is hashed, and closing it waits for the disk.

    Raises:
        OSError: naming the file, whichever call failed; also when the file exists already.
    """

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.buffer = bytearray()

    def write(self, data: Any) -> int:
        """Append any object with the buffer protocol. Returns its size in bytes."""
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.size_bytes += len(view)
        if len(view) < BUFFER_BYTES:
            self.buffer += view
            if len(self.buffer) >= BUFFER_BYTES:
                self.flush()
        else:
            self.flush()
            write_all(self.descriptor, view, self.path)
        return len(view)

    def flush(self) -> None:
        write_all(self.descriptor, memoryview(self.buffer), self.path)
        self.buffer = bytearray()

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                self.flush()
                sync(self.descriptor, self.path)
        finally:
            os.close(self.descriptor)

    @property
    def entry(self) -> dict[str, Any]:
        """The file's entry in a manifest."""
        return {"bytes": self.size_bytes, "sha256": self.digest.hexdigest()}


def write_all(descriptor: int, view: memoryview, path: Path) -> None:
    """Write every byte. An error names the file, which the operating system's own error does not."""
    try:
        while len(view):
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise with_path(error, path) from error


def sync(descriptor: int, path: Path) -> None:
    """Wait until everything written to the file is on the disk."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise with_path(error, path) from error


def with_path(error: OSError, path: Path) -> OSError:
    """The same error, naming the file."""
    return OSError(error.errno, error.strerror, str(path))


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write a new file durably. Returns its entry in a manifest."""
    with DurableFile(path) as file:
        file.write(content)
    return file.entry


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file atomically and durably: readers, also after a crash, find either the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    if os.path.lexists(temporary):  # an earlier process died while writing it
        os.unlink(temporary)
    write_bytes(temporary, content.encode() if isinstance(content, str) else content)
    rename_file(temporary, path)


def rename_file(temporary: Path, path: Path) -> None:
    """Give a file whose content is durable its final name, replacing an older file, and make the rename durable."""
    os.rename(temporary, path)
    sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, each durably."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:  # another rank created it first
        if not path.is_dir():
            raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Wait until everything that any process wrote into a file, or the names in a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def give_name(temporary: Path, published: Path, replace: bool = True) -> None:
    """Give a directory whose files are durable its final name, and make the rename durable.

    Args:
        replace: swap places with an older directory of that name, then delete it.

    Raises:
        OSError: without ``replace``, when an older directory of that name is not empty.
    """
    sync_directory(temporary)
    if not replace or not os.path.lexists(published):
        os.rename(temporary, published)
        sync_directory(published.parent)
        return
    exchange(temporary, published)
    sync_directory(published.parent)
    delete(temporary)


def exchange(new: Path, old: Path) -> None:
    """Swap two directories atomically, so that a reader always finds the old one or the new one under ``old``.

    On file systems that have no atomic swap (NFS) renames take its place; for a moment between them the name is missing.
    """
    if not swap(new, old):
        aside = old.with_name(f".{old.name}.old")
        delete(aside)
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)


def swap(a: Path, b: Path) -> bool:
    """Linux's ``renameat2`` with RENAME_EXCHANGE. Returns False where the system or the file system does not support it."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    AT_FDCWD, RENAME_EXCHANGE = -100, 2
    if renameat2(AT_FDCWD, os.fsencode(a), AT_FDCWD, os.fsencode(b), RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):
        return False
    raise OSError(number, os.strerror(number), str(b))


def delete(path: Path) -> None:
    """Delete a file, a link or a directory with all that is in it, if it exists."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for inside in sorted(path.iterdir()):
        delete(inside)
    os.rmdir(path)
