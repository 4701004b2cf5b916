"""Files and names that outlive a power loss: what is written is on the disk before it is found under its name.

The parts of every publication: a file is hashed while it is written and fsynced when it is closed; a small file, or a whole
directory, takes its place by one rename; then the directory that holds the name is fsynced. Imports no torch.
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
    """A new file: small writes are gathered, every byte is hashed, and closing it waits for the disk.

    Raises:
        OSError: which names the file, whatever the call was that failed.
    """

    def __init__(self, path: Path):
        self.path = path
        self.descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.digest = hashlib.sha256()
        self.size_bytes = 0
        self.buffer = bytearray()

    def write(self, data: Any) -> int:
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
        """What a manifest says of the file."""
        return {"bytes": self.size_bytes, "sha256": self.digest.hexdigest()}


def write_all(descriptor: int, view: memoryview, path: Path) -> None:
    """Write every byte; an error names the file, which the system's own does not."""
    try:
        while len(view):
            view = view[os.write(descriptor, view) :]
    except OSError as error:
        raise named(error, path) from error


def sync(descriptor: int, path: Path) -> None:
    """Wait until the disk has what was written."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise named(error, path) from error


def named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror, str(path))


def write_bytes(path: Path, content: bytes) -> dict[str, Any]:
    """Write a new file through to the disk; its manifest entry."""
    with DurableFile(path) as file:
        file.write(content)
    return file.entry


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader, or a crash, finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    if os.path.lexists(temporary):  # an earlier process died while it wrote it
        os.unlink(temporary)
    write_bytes(temporary, content.encode() if isinstance(content, str) else content)
    replace_name(temporary, path)


def replace_name(temporary: Path, path: Path) -> None:
    """Let a file whose bytes are durable be found under its name from now on, in place of an older one."""
    os.rename(temporary, path)
    sync_directory(path.parent)


def make_directory(path: Path) -> None:
    """Make a directory, and those above it, so that a crash does not take away the name of any."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        os.mkdir(path)
    except FileExistsError:  # another rank was quicker
        if not path.is_dir():
            raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory."""
    sync_file(path)


def sync_file(path: Path) -> None:
    """Wait until the disk has what anybody wrote into a file, or the names in a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        sync(descriptor, path)
    finally:
        os.close(descriptor)


def give_name(temporary: Path, published: Path, replace: bool = True) -> None:
    """Let a directory, whose files are durable, be found under its name from now on.

    Args:
        replace: take the place of an older one; without it, an older one that is not empty is an OSError.
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
    """Swap two names in one step, so that a reader finds the old directory or the new one.

    File systems that cannot (NFS) take two renames: in the moment between them there is neither.
    """
    if not swap(new, old):
        aside = old.with_name(f".{old.name}.old")
        delete(aside)
        os.rename(old, aside)
        os.rename(new, old)
        os.rename(aside, new)


def swap(a: Path, b: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where the system or the file system does not have it."""
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
    """Delete a file, a link or a whole directory, if it is there."""
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for inside in sorted(path.iterdir()):
        delete(inside)
    os.rmdir(path)
