"""The run directory: its layout, its lock, the configuration that it belongs to. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmerge import config_file
from distmerge.config import TrainConfig
from distmerge.errors import UserError

if TYPE_CHECKING:
    from distmerge.mesh import Mesh


class RunDirectory:
    """``RUN_DIR``: config.toml, environment.json, metrics.jsonl, events.jsonl, tensorboard/, checkpoints/, window/, steps/,
    final/, summary.json."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.window = self.path / "window"
        self.final = self.path / "final"
        self.summary = self.path / "summary.json"

    def check(self, config: TrainConfig) -> None:
        """Refuse a directory that cannot be written or that belongs to another configuration."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with open(self.path / "lock", "a"):
                pass
        except OSError as error:
            raise UserError(f"config.run_dir must be writable, got {self.path}: {error.strerror}") from None
        if not self.config.exists():
            return
        try:
            stored = config_file.read(str(self.config), [])
        except UserError as error:
            raise UserError(
                f"{self.config}, from an earlier version: {error}; change it there or take another --run-dir"
            ) from None
        if changed := config_file.differing_keys(stored, config):
            raise UserError(
                f"config.run_dir {self.path} belongs to a run of another configuration; differing keys: "
                f"{', '.join(changed)}; take another --run-dir, or only change {', '.join(config_file.MAY_CHANGE[1:])}"
            )

    def begin(self, config: TrainConfig, command: list[str]) -> None:
        """Write what the run is: the resolved configuration and where the code came from."""
        write_atomically(self.config, config_file.dump(config))
        environment = {
            "command": command,
            "revision": git_revision(),
            "python": sys.version.split()[0],
            "host": socket.gethostname(),
        }
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")

    def finished(self, steps: int) -> dict[str, Any] | None:
        """The summary of a run that has reached ``steps``, or was stopped before; None while there is work to do."""
        if not self.summary.exists() or not self.final.exists():
            return None
        summary = json.loads(self.summary.read_text())
        return summary if summary["steps"] >= steps or summary.get("stopped") else None

    def publish_final(self, temporary: Path) -> None:
        """Put a complete model directory in place of ``final``."""
        old = self.path / ".old-final"
        shutil.rmtree(old, ignore_errors=True)
        if self.final.exists():
            self.final.rename(old)
        temporary.rename(self.final)
        shutil.rmtree(old, ignore_errors=True)


class Lock:
    """Held by every rank of a job while it uses the run directory; the kernel frees it when they die.

    Rank r holds byte r of ``RUN_DIR/lock``. The first rank takes the job: it holds byte 0 and finds all others free.
    These are POSIX locks: they work over NFS and are not inherited by child processes.
    """

    def __init__(self, run: RunDirectory):
        self.file = open(run.path / "lock", "a+")  # noqa: SIM115
        self.run = run

    def take_job(self, patience_seconds: float = 5.0) -> None:
        """Take byte 0 if nobody holds any byte. Ranks of a job that was just killed may need a moment to vanish."""
        deadline = time.monotonic() + patience_seconds
        while not (self._try(0, 1) and self._try(1, 0)):
            if time.monotonic() > deadline:
                self.file.seek(0)
                raise UserError(f"config.run_dir {self.run.path} is in use by {self.file.read().strip() or 'another job'}")
            time.sleep(0.1)
        fcntl.lockf(self.file, fcntl.LOCK_UN, 0, 1)
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
        self.file.flush()

    def join(self, rank: int) -> None:
        """Take byte ``rank``, after the first rank took the job."""
        fcntl.lockf(self.file, fcntl.LOCK_EX, 1, rank)

    def release(self) -> None:
        self.file.close()

    def _try(self, start: int, length: int) -> bool:
        try:
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True


def take_lock(directory: RunDirectory, config: TrainConfig, mesh: Mesh, command: list[str]) -> Lock:
    """The run directory, for all ranks of this job and no other."""
    with mesh.together():
        directory.check(config)
        lock = Lock(directory)
        if mesh.leads:
            lock.take_job()
            directory.begin(config, command)
    lock.join(mesh.rank)
    return lock


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that a reader, or a crash, finds the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def git_revision() -> str | None:
    """The revision of the working tree that this package runs from, "+changes" if it has any; None outside of git."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
