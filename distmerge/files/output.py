"""An output directory that appears whole or not at all: it is written, and resumed, under a hidden name and then renamed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.files.atomic import delete, give_name, make_directory, sync_directory, write_bytes
from distmerge.files.layout import Shard

JOURNAL = "journal.jsonl"
LOCK = "lock"
RECORD = "merge.json"
SYNC_SECONDS = 5.0
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.EFBIG)


class Output:
    """The directory ``out`` while it is being written, as ``.NAME.merging`` beside it.

    A journal in it lists the finished tensors, so that an interrupted merge can resume. It is trusted only if a merge with the
    same ``identity`` wrote it.

    Attributes:
        done: the note of each tensor that an earlier, interrupted merge finished, by the tensor's name.
        files: the open descriptor of each shard, by the shard's name.

    Raises:
        UserError: when ``out`` exists, another merge is writing it, or the disk is full or not writable.
    """

    def __init__(self, out: Path, identity: str, shards: list[Shard]):
        self.out, self.shards = out, shards
        self.path = out.parent / f".{out.name}.merging"
        self.done: dict[str, Any] = {}
        self._pending: list[str] = []
        self._synced = time.monotonic()
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushing: Future[None] | None = None
        with disk_errors(self.path):
            make_directory(out.parent)
            self.path.mkdir(exist_ok=True)
            self._lock = open(self.path / LOCK, "a")  # noqa: SIM115
        self._take_lock()
        try:
            with disk_errors(self.path):
                if not self._resume(identity):
                    self._begin(identity)
        except UserError:
            self.discard()
            raise
        with disk_errors(self.path):
            self.files = {part.name: os.open(self.path / part.name, os.O_RDWR) for part in shards}

    def write(self, shard: Shard, offset: int, data: memoryview) -> None:
        """Write ``data`` at a byte offset of the shard's file. Several threads may write at the same time."""
        with disk_errors(self.path / shard.name):
            while data:
                written = os.pwrite(self.files[shard.name], data, offset)
                data, offset = data[written:], offset + written

    def finish(self, name: str, note: Any = None) -> None:
        """Record that the tensor ``name`` is written. Every few seconds the data and the journal are made durable.

        Args:
            note: kept in the journal; a merge that resumes finds it in ``done``.
        """
        self._pending.append(json.dumps({"tensor": name, "note": note}))
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def flush(self) -> None:
        """Start writing back to disk, in the background, what is written so far: the final sync then has less to wait for."""
        if self._flushing is not None and self._flushing.done():
            self._flushing = self._flushing.result()
        if self._flushing is None:
            self._flushing = self._flusher.submit(self._flush)

    def _flush(self) -> None:
        with disk_errors(self.path):
            for descriptor in self.files.values():
                os.fdatasync(descriptor)

    def sync(self) -> None:
        """Make the data durable, and only then the journal lines that say it is finished."""
        self._flush()
        with disk_errors(self.path), open(self.path / JOURNAL, "a") as file:
            file.write("".join(line + "\n" for line in self._pending))
            file.flush()
            os.fsync(file.fileno())
        self._pending.clear()
        self._synced = time.monotonic()

    def publish(self, extra: dict[str, bytes]) -> None:
        """Write the small files ``extra`` (content by name), make everything durable and give the directory its final name."""
        self._flusher.shutdown()
        self.sync()
        with disk_errors(self.path):
            for name, content in extra.items():
                delete(self.path / name)  # an interrupted merge may have written it already
                write_bytes(self.path / name, content)
            for descriptor in self.files.values():
                os.close(descriptor)
            (self.path / JOURNAL).unlink()
            refuse_existing(self.out)
        with disk_errors(self.out, published=self.out):
            give_name(self.path, self.out, replace=False)
            (self.out / LOCK).unlink()  # only now: another process that takes the lock clears the directory
            sync_directory(self.out)
        self._lock.close()

    def discard(self) -> None:
        """Delete the hidden directory, after an error that the user must fix before the merge is started from scratch."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # It is another file if, in between, that merge was published or discarded and a third one began.
            held = os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK))
        except OSError:
            held = False
        if not held:
            raise UserError(f"another merge is writing {self.out}")
        if self.out.exists():
            self.discard()
            refuse_existing(self.out)

    def _resume(self, identity: str) -> bool:
        """Read the journal into ``done``. Returns whether there is one, it is of this merge and all shards have their size."""
        try:
            first, *lines = (self.path / JOURNAL).read_text().splitlines()
            if json.loads(first) != {"identity": identity}:
                return False
            if any((self.path / part.name).stat().st_size != part.bytes for part in self.shards):
                return False
        except (OSError, ValueError):
            return False
        for line in lines:
            try:
                entry = json.loads(line)
            except ValueError:  # the last line, torn when the machine stopped while it was written
                break
            self.done[entry["tensor"]] = entry["note"]
        return True

    def _begin(self, identity: str) -> None:
        for leftover in self.path.iterdir():
            if leftover.name != LOCK:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for part in self.shards:
            with disk_errors(self.path / part.name), open(self.path / part.name, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, part.bytes)  # fails now if the disk is too small
                file.write(part.header)
        with open(self.path / JOURNAL, "w") as file:
            file.write(json.dumps({"identity": identity}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def refuse_existing(out: Path) -> None:
    if out.exists() or out.is_symlink():
        raise UserError(f"--out must not exist yet, got {out}")


@contextmanager
def disk_errors(path: Path, published: Path | None = None) -> Iterator[None]:
    """Turn errors of a disk that is full or not writable into the user's error.

    Args:
        published: the output directory, when it may have its final name already at the time of the error.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (*DISK_ERRORS, errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.ENAMETOOLONG):
            raise
        named = published is not None and published.exists()
        state = "the model is complete, but a file named lock was left in it" if named else "nothing was published"
        raise UserError(f"cannot write {error.filename or path}: {error.strerror}; {state}") from None
