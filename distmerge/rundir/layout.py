"""The run directory: its layout, its lock, and the configuration that it belongs to. Imports no torch."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmerge.config import toml
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.files.atomic import make_directory, sync_directory, write_atomically
from distmerge.files.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from distmerge.mesh import Mesh


class RunDirectory:
    """The paths in ``RUN_DIR``: config.toml, environment.json, metrics.jsonl, events.jsonl, tensorboard/, checkpoints/,
    window/, steps/, final/ or final.diverged/, summary.json."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.toml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.window = self.path / "window"
        self.final = self.path / "final"
        self.diverged = self.path / "final.diverged"
        self.summary = self.path / "summary.json"

    @property
    def claimed(self) -> bool:
        """Whether a run has taken its first step here. Until then another configuration may start in the directory."""
        return self.config.exists()

    def check(self, config: TrainConfig) -> None:
        """Refuse a directory that cannot be written or that belongs to another configuration.

        Raises:
            UserError: in either case.
        """
        try:
            make_directory(self.path)
            with open(self.path / "lock", "a"):
                pass
        except OSError as error:
            raise UserError(f"config.run_dir must be writable, got {self.path}: {error.strerror}") from None
        if not self.claimed:
            return
        try:
            stored = toml.read_stored(str(self.config))
        except UserError as error:
            raise UserError(
                f"{self.config} was written by an earlier version: {error}; change it there or take another --run-dir"
            ) from None
        if changed := toml.differing_keys(stored, config):
            raise UserError(
                f"config.run_dir {self.path} belongs to a run of another configuration; differing keys: "
                f"{', '.join(changed)}; take another --run-dir, start from scratch with --restart, or only change "
                f"{', '.join(toml.MAY_CHANGE[1:])}"
            )

    def begin(self, config: TrainConfig, command: list[str], identity: dict[str, Any] | None = None) -> None:
        """Write environment.json, which says where the code came from and which run this is, and then the resolved
        configuration, which claims the directory."""
        environment = {
            "command": command,
            "revision": git_revision(),
            "python": sys.version.split()[0],
            "host": socket.gethostname(),
            **(identity or {}),
        }
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=2) + "\n")
        write_atomically(self.config, toml.dump(config))

    def finished(self, steps: int) -> dict[str, Any] | None:
        """The summary of a run that has reached ``steps`` or was stopped before that; None while there is work to do.

        There is also work to do if the final model is missing, or its manifest gives another number of steps than the summary.

        Raises:
            UserError: if the summary cannot be read.
        """
        if not self.summary.exists():
            return None
        try:
            summary = json.loads(self.summary.read_bytes())
            ended, diverged = summary["steps"], summary.get("diverged")
            over = ended >= steps or bool(summary.get("stopped"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.summary} cannot be read ({type(error).__name__}: {error}); delete it and start again to write a new one"
            ) from None
        place = self.diverged if diverged else self.final
        if not place.is_dir():
            return None
        try:  # an older version's final model has no manifest
            of_steps = read_manifest(place)["steps"] if (place / MANIFEST).exists() else ended
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return summary if over and of_steps == ended else None

    def divergence_message(self, reason: str) -> str:
        """The message, in one line, about a run that ended with a model that diverged."""
        return (
            f"the run in {self.path} diverged: {reason}; its model is kept as {self.diverged.name}, do not use it as a result; "
            "lower optimizer.lr and start from scratch with --restart, or go back with distmerge recover --before STEP"
        )

    def move_aside(self) -> Path:
        """Rename the directory to ``RUN_DIR.old-N``, with the first N that is free; its new path."""
        number = 1
        while os.path.lexists(aside := self.path.with_name(f"{self.path.name}.old-{number}")):
            number += 1
        try:
            os.rename(self.path, aside)
            sync_directory(aside.parent)
        except OSError as error:
            raise UserError(f"cannot move {self.path} to {aside}: {error.strerror}") from None
        return aside


class Lock:
    """A lock that every rank of a job holds while the job uses the run directory. The kernel releases it when a rank dies.

    Rank r holds byte r of ``RUN_DIR/lock``. Rank 0 first takes the job: it may do so only if no byte is held. These are POSIX
    locks: they work over NFS and are not inherited by child processes.
    """

    def __init__(self, run: RunDirectory):
        self.file = open(run.path / "lock", "a+")  # noqa: SIM115
        self.run = run

    def take_job(self, patience_seconds: float = 5.0) -> None:
        """Take byte 0 if nobody holds any byte.

        Args:
            patience_seconds: how long to wait for that: the ranks of a job that was just killed may need a moment to exit.

        Raises:
            UserError: if the directory is still in use after that.
        """
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
        """Take byte ``rank``, after rank 0 has taken the job."""
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


def begin_anew(directory: RunDirectory) -> Path | None:
    """Move a run's directory out of the way; its new path. None if no run has claimed it: then it stays.

    Raises:
        UserError: if a job is using it.
    """
    if not directory.claimed and not any(directory.checkpoints.glob("step-*")):
        return None
    lock = Lock(directory)
    lock.take_job()
    try:
        return directory.move_aside()
    finally:
        lock.release()


def take_lock(directory: RunDirectory, config: TrainConfig, mesh: Mesh) -> Lock:
    """Lock the run directory for the ranks of this job. A collective.

    Raises:
        UserError: if another job uses it, it cannot be written, or it belongs to another configuration.
    """
    with mesh.raise_on_all_ranks():
        directory.check(config)
        lock = Lock(directory)
        if mesh.leads:
            lock.take_job()
    lock.join(mesh.rank)
    return lock


def git_revision() -> str | None:
    """The git revision of this package, followed by "+changes" if it has uncommitted ones; None outside of a git repository."""
    here = Path(__file__).parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes", "--abbrev=40", "--exclude=*"],
            cwd=here, capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()
