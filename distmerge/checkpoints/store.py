"""The store: checkpoints that can be trusted.

Commit: a temporary directory -> every rank writes its files -> fsync -> hashes are gathered -> rank 0 writes the manifest
-> fsync -> rename -> fsync of the parent -> only then retention. Whatever dies when, a published directory is whole. It
never changes afterwards, and it is loaded only if every byte still hashes to what the manifest says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from distmerge.errors import UserError
from distmerge.mesh import Mesh

MANIFEST = "manifest.json"


class Rejection(NamedTuple):
    path: Path
    reason: str


class Store:
    """The checkpoints of one run, one directory a step, written and read by all ranks together.

    Every public method is a collective. A file's name gives its format: .safetensors (a dict of tensors), .pt (torch, read
    with weights_only) or .json.
    """

    def __init__(self, root: Path, mesh: Mesh, keep: int):
        self.root, self.mesh, self.keep = root, mesh, keep

    def open(self) -> None:
        """Make the directory, and clear away what an interrupted commit left."""
        with self.mesh.together():
            if self.mesh.leads:
                guarded(self.root, lambda: self.root.mkdir(parents=True, exist_ok=True))
                for leftover in self.root.glob(".*"):
                    shutil.rmtree(leftover)

    def commit(self, step: int, files: dict[str, Any]) -> Path:
        """Publish ``files`` of all ranks as the checkpoint of ``step``.

        Raises:
            UserError: when the disk is full or not writable; everything published before is as it was.
        """
        name = f"step-{step:08}"
        temporary, published = self.root / f".{name}", self.root / name
        with self.mesh.together():
            if self.mesh.leads:
                guarded(temporary, temporary.mkdir)
        entries: dict[str, dict[str, Any]] = {}
        with self.mesh.together():
            for file, content in files.items():
                entries[file] = guarded(
                    temporary / file, lambda path=temporary / file, content=content: write_file(path, content)
                )
        gathered: list[dict[str, dict[str, Any]]] = [{}] * self.mesh.world
        dist.all_gather_object(gathered, entries)
        with self.mesh.together():
            if self.mesh.leads:
                manifest = {
                    "step": step,
                    "world": self.mesh.world,
                    "workers": self.mesh.workers,
                    "files": {file: entry for part in gathered for file, entry in sorted(part.items())},
                }
                guarded(published, lambda: publish(temporary, published, manifest))
                self._retain()
        return published

    def newest_valid(self) -> tuple[Path | None, list[Rejection]]:
        """The newest checkpoint that verifies, and those that were rejected on the way to it.

        Rejected ones are set aside as ``step-N.rejected``, so that the step can be published again.

        Raises:
            UserError: when there are checkpoints but all are damaged, or the newest valid one is of another mesh.
        """
        candidates: list[list[Path]] = [published_checkpoints(self.root) if self.mesh.leads else []]
        dist.broadcast_object_list(candidates, 0)
        rejections: list[Rejection] = []
        for path in reversed(candidates[0]):
            problem = self._verify(path)
            if problem is None:
                with self.mesh.together():
                    self._check_mesh(path)
                    if self.mesh.leads:
                        for rejection in rejections:
                            guarded(rejection.path, lambda path=rejection.path: set_aside(path))
                return path, rejections
            rejections.append(Rejection(path, problem))
        with self.mesh.together():
            if rejections:
                reasons = "; ".join(f"{rejection.path.name}: {rejection.reason}" for rejection in rejections)
                raise UserError(f"every checkpoint in {self.root} is damaged ({reasons}); move them away to start anew")
        return None, []

    def _verify(self, path: Path) -> str | None:
        """What is wrong with a checkpoint; its files are hashed by all ranks, each its part."""
        problems: list[str | None] = [None] * self.mesh.world
        dist.all_gather_object(problems, verify(path, self.mesh.rank, self.mesh.world))
        return next((problem for problem in problems if problem), None)

    def _check_mesh(self, path: Path) -> None:
        manifest = read_manifest(path)
        theirs, ours = (manifest["world"], manifest["workers"]), (self.mesh.world, self.mesh.workers)
        if theirs != ours:
            raise UserError(
                f"{path} was written by {theirs[0]} ranks in {theirs[1]} workers, got {ours[0]} ranks in {ours[1]}; "
                "resume with as many, or take another --run-dir"
            )

    def _retain(self) -> None:
        for path in published_checkpoints(self.root)[: -self.keep]:
            # Renamed first: a half-deleted checkpoint must not look like a damaged one.
            doomed = path.with_name(f".doomed-{path.name}")
            path.rename(doomed)
            shutil.rmtree(doomed)


def reader(path: Path) -> Callable[[str], Any]:
    """``read(name)`` for the files of a checkpoint."""
    return lambda name: read_file(path / name)


def published_checkpoints(root: Path) -> list[Path]:
    """Directories of published checkpoints, oldest first."""
    return sorted(path for path in root.glob("step-*") if path.is_dir() and path.suffix != ".rejected")


def verify(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a checkpoint, or None. With ``parts``, only every parts-th file is hashed, from ``part`` on."""
    try:
        manifest = read_manifest(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    if path.name != f"step-{manifest['step']:08}":
        return f"{MANIFEST} says step {manifest['step']}"
    for name, entry in list(manifest["files"].items())[part::parts]:
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} bytes, {MANIFEST} says {entry['bytes']}"
        if sha256(file) != entry["sha256"]:
            return f"{name} does not have the SHA-256 that {MANIFEST} says"
    return None


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest, which carries a hash of itself."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    stored = manifest.pop("sha256")
    if hash_of(manifest) != stored:
        raise ValueError("its own SHA-256 does not match")
    return manifest


def publish(temporary: Path, published: Path, manifest: dict[str, Any]) -> None:
    write_file(temporary / MANIFEST, manifest | {"sha256": hash_of(manifest)})
    fsync(temporary)
    temporary.rename(published)
    fsync(published.parent)


def set_aside(path: Path) -> None:
    aside = path.with_name(path.name + ".rejected")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write a file through to the disk; its size and hash."""
    match path.suffix:
        case ".safetensors":
            save_file(content, path)
        case ".pt":
            with open(path, "wb") as file:
                torch.save(content, file)
        case ".json":
            path.write_text(json.dumps(content, indent=1) + "\n")
        case _:
            raise AssertionError(f"no format for {path.name}")
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def read_file(path: Path) -> Any:
    match path.suffix:
        case ".safetensors":
            return load_file(path)
        case ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        case ".json":
            return json.loads(path.read_text())
    raise AssertionError(f"no format for {path.name}")


def guarded(path: Path, work: Callable[[], Any]) -> Any:
    """``work()``, with a disk that is full or not writable as the user's error."""
    try:
        return work()
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; free some space or take another run_dir, and start again") from error


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
