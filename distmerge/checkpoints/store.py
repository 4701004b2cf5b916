"""The store: writes checkpoints atomically and verifies them before they are trusted.

A commit makes a temporary directory -> every rank writes its files -> fsync -> hashes are gathered -> rank 0 writes the
manifest -> fsync -> rename -> fsync of the parent directory. Only then are old checkpoints deleted, and only if the newest one
reads back as it was written. A published directory is complete, whichever process dies at whatever time. It never changes
afterwards, and it is loaded only if all of its files still have the hashes that the manifest records.
"""

from __future__ import annotations

import math
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from distmerge.checkpoints.health import unsound_checkpoint
from distmerge.checkpoints.staging import Staging
from distmerge.errors import UserError
from distmerge.files.directories import (
    clear_leftovers,
    guarded,
    publish,
    published_directories,
    read_manifest,
    remove,
    set_aside,
    verify,
    write_file,
)
from distmerge.mesh import Mesh
from distmerge.rundir.identity import Identity, identity_problem


class Rejection(NamedTuple):
    """A checkpoint that cannot be used, and why."""

    path: Path
    reason: str


class Store:
    """The checkpoints of one run, one directory per step. All ranks write and read them together.

    Every public method is a collective. Only the store uses the process group ``mesh.files``. If commits run in a background
    thread, that thread uses the group, and calls from the training thread first wait until it is idle: two threads on one group
    would receive each other's messages.

    Args:
        root: the directory that holds the checkpoints.
        keep: the number of newest checkpoints to keep.
        asynchronous: copy the state and write the copy in a background thread, by the same protocol. Training continues once
            the copy is made.
        about: what to record in manifests besides the files, such as the number of ranks that wrote them.
        identity: the run's identity, on the lead rank. Checkpoints of other runs are rejected.
    """

    def __init__(
        self,
        root: Path,
        mesh: Mesh,
        keep: int,
        asynchronous: bool = False,
        about: dict[str, Any] | None = None,
        identity: Identity | None = None,
    ):
        self.root, self.mesh, self.keep, self.identity = root, mesh, keep, identity
        self.about = about or {"world": mesh.world, "workers": mesh.workers}
        self.staging = Staging(mesh.device) if asynchronous else None
        self.todo: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()
        self.written = threading.Event()
        self.written.set()
        if asynchronous:  # one thread for all commits, since to start one takes milliseconds
            threading.Thread(target=self._commit_in_background, daemon=True).start()
        self.failure: BaseException | None = None

    def open(self) -> None:
        """Create the directory if it does not exist, and delete what an interrupted commit left in it."""
        with self.mesh.raise_on_all_ranks():
            if self.mesh.leads:
                guarded(self.root, lambda: clear_leftovers(self.root))

    def commit(self, step: int, files: dict[str, Any]) -> Path:
        """Publish ``files`` of all ranks as the checkpoint of ``step``, or begin to if the store is asynchronous.

        Args:
            files: this rank's files, by name.

        Returns:
            the checkpoint's directory.

        Raises:
            UserError: if the disk is full or not writable. Everything published before stays as it was. An error of a
                background commit is raised by the next call of any method that waits for it.
        """
        self.wait()
        if self.staging is None:
            self._commit(step, files)
        else:
            self.written.clear()
            self.todo.put((step, self.staging.copy(files)))
        return self.root / f"step-{step:08}"

    def wait(self) -> None:
        """Wait until a background commit, if there is one, is published. Raises its error."""
        self.written.wait()
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure

    def _commit_in_background(self) -> None:
        while True:
            step, files = self.todo.get()
            try:
                self._commit(step, files)
            except BaseException as error:  # the training thread raises it, at its next call
                self.failure = error
            self.written.set()

    def _commit(self, step: int, files: dict[str, Any]) -> None:
        group = self.mesh.files
        name = f"step-{step:08}"
        temporary, published = self.root / f".{name}", self.root / name
        with self.mesh.raise_on_all_ranks(group):
            if self.mesh.leads:
                guarded(temporary, lambda: os.mkdir(temporary))
        entries: dict[str, dict[str, Any]] = {}
        with self.mesh.raise_on_all_ranks(group):
            for file, content in files.items():
                path = temporary / file
                entries[file] = guarded(path, lambda path=path, content=content: write_file(path, content))
        gathered: list[dict[str, dict[str, Any]]] = [{}] * self.mesh.world
        dist.all_gather_object(gathered, entries, group=group)
        with self.mesh.raise_on_all_ranks(group):
            if self.mesh.leads:
                manifest = {
                    "step": step,
                    **self.about,
                    **(self.identity.manifest_entries() if self.identity else {}),
                    "files": {file: entry for part in gathered for file, entry in sorted(part.items())},
                }
                guarded(published, lambda: publish(temporary, published, manifest))
        self._retain(published)

    def _retain(self, newest: Path) -> None:
        """Delete all but the newest ``keep`` checkpoints, unless the newest one fails verification: then the older ones are
        still needed."""
        doomed: list[list[Path]] = [published_checkpoints(self.root)[: -self.keep] if self.mesh.leads else []]
        dist.broadcast_object_list(doomed, 0, group=self.mesh.files)
        if not doomed[0]:
            return
        problem = self._verify(newest)
        with self.mesh.raise_on_all_ranks(self.mesh.files):
            if self.mesh.leads:
                if problem is not None:
                    raise UserError(f"{newest} does not read back as it was written: {problem}; older checkpoints are kept")
                for path in doomed[0]:
                    guarded(path, lambda path=path: remove(path))

    def newest_valid(self, fits: Callable[[Path], None] | None = None) -> tuple[Path | None, list[Rejection]]:
        """The newest checkpoint that is valid, and the newer ones that were rejected.

        Rejected ones are renamed to ``step-N.rejected``, so that the step can be published again.

        Args:
            fits: raises if the run cannot resume from the newest valid checkpoint; it is called before anything is renamed. By
                default it checks that the numbers of ranks and workers are the same.

        Raises:
            UserError: if there are checkpoints but all are damaged or of other runs, or if the newest valid one does not fit.
        """
        accepted, rejections = self.valid(1)
        with self.mesh.raise_on_all_ranks():
            if rejections and not accepted:
                reasons = "; ".join(f"{rejection.path.name}: {rejection.reason}" for rejection in rejections)
                what = "damaged or of another run" if "of another run" in reasons else "damaged"
                raise UserError(f"every checkpoint in {self.root} is {what} ({reasons}); move them away to start from scratch")
            if accepted:
                (fits or self._check_mesh)(accepted[0])
            if self.mesh.leads:
                for rejection in rejections:
                    guarded(rejection.path, lambda path=rejection.path: set_aside(path, "rejected"))
        return (accepted[0] if accepted else None), rejections

    def valid(self, count: int, up_to: float = math.inf) -> tuple[list[Path], list[Rejection]]:
        """The newest ``count`` checkpoints that verify and are finite, newest first; and those that were rejected among them.

        Args:
            up_to: the last step to consider.
        """
        self.wait()
        candidates: list[list[Path]] = [published_checkpoints(self.root) if self.mesh.leads else []]
        dist.broadcast_object_list(candidates, 0, group=self.mesh.files)
        accepted: list[Path] = []
        rejections: list[Rejection] = []
        for path in reversed(candidates[0]):
            if len(accepted) == count:
                break
            if step_of(path) > up_to:
                continue
            problem = self._verify(path) or self._first_problem(unsound_checkpoint(path, self.mesh.rank, self.mesh.world))
            if problem is None:
                accepted.append(path)
            else:
                rejections.append(Rejection(path, problem))
        return accepted, rejections

    def _verify(self, path: Path) -> str | None:
        """What is wrong with a checkpoint, or None. Each rank hashes its share of the files."""
        return self._first_problem(verify(path, self.mesh.rank, self.mesh.world) or identity_problem(path, self.identity))

    def _first_problem(self, problem: str | None) -> str | None:
        return self.mesh.first_problem(problem, self.mesh.files)

    def _check_mesh(self, path: Path) -> None:
        manifest = read_manifest(path)
        theirs, ours = (manifest["world"], manifest["workers"]), (self.mesh.world, self.mesh.workers)
        if theirs != ours:
            raise UserError(
                f"{path} was written by {theirs[0]} ranks in {theirs[1]} workers, got {ours[0]} ranks in {ours[1]}; "
                "resume with the same numbers, or take another --run-dir"
            )


def published_checkpoints(root: Path) -> list[Path]:
    """Directories of published checkpoints, oldest first."""
    return published_directories(root, "step")


def step_of(path: Path) -> int:
    """The step in the name of a published directory."""
    return int(path.name.rpartition("-")[2])
