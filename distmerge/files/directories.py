"""Directories that appear whole or not at all: their files are made durable and hashed, then one rename publishes them.

Each directory carries a manifest with the size and SHA-256 of every file, and a hash of the manifest itself. Checkpoints,
blocks of a window, published steps and the final model are all published by :func:`publish`. The files of a checkpoint are
hashed while they are written, so that reading them detects a write that was torn or corrupted.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from distmerge.errors import UserError
from distmerge.files.atomic import (
    DurableFile,
    delete,
    give_name,
    make_directory,
    rename_file,
    sync_directory,
    sync_file,
)
from distmerge.files.header import encode_header
from distmerge.files.manifest import HASH_NAMES, HASHES, MANIFEST, as_json, entry_of, read_manifest, sealed
from distmerge.files.sources import NAMES


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write a new file durably, in the format of its suffix: .safetensors (a dict of tensors), .pt (torch) or .json.

    Returns:
        its entry in a manifest.
    """
    with DurableFile(path) as file:
        match path.suffix:
            case ".safetensors":
                write_tensors(file, content)
            case ".pt":
                torch.save(content, file)  # pyright: ignore[reportArgumentType]
            case ".json":
                file.write(as_json(content))
            case _:
                raise AssertionError(f"no format for {path.name}")
    return file.entry


def write_tensors(file: DurableFile, tensors: dict[str, Tensor]) -> None:
    """Write the safetensors format tensor by tensor, so that only one of them is copied at a time."""
    header, _ = encode_header({name: (NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()})
    file.write(header)
    for tensor in tensors.values():
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def replace_file(path: Path, content: Any) -> None:
    """Write a file of any of :func:`write_file`'s formats atomically: a reader finds the old content or the new."""
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    delete(temporary)  # an earlier process may have died while writing it
    write_file(temporary, content)
    rename_file(temporary, path)


def read_file(path: Path) -> Any:
    """What :func:`write_file` wrote."""
    match path.suffix:
        case ".safetensors":
            return load_file(path)
        case ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        case ".json":
            return json.loads(path.read_text())
    raise AssertionError(f"no format for {path.name}")


def reader(path: Path) -> Callable[[str], Any]:
    """``read(name)`` for the files of a directory."""
    return lambda name: read_file(path / name)


def publish(temporary: Path, published: Path, manifest: dict[str, Any], name: str = MANIFEST) -> None:
    """Write the manifest of files that are durable, and give the directory its final name; before that, readers do not find
    it. An older directory of that name is replaced.

    Args:
        name: of the manifest's file.
    """
    write_file(temporary / name, sealed(manifest))
    give_name(temporary, published)


def publish_directory(published: Path, about: dict[str, Any], write: Callable[[Path], None], name: str = MANIFEST) -> None:
    """Publish files that other libraries' code writes, such as a model directory: written under a hidden name, fsynced,
    hashed and renamed.

    Args:
        about: the manifest's entries besides the files.
        write: fills the hidden directory, which exists and is empty.
        name: of the manifest's file.

    Raises:
        UserError: when the disk is full or not writable. What was published before stays as it was.
    """
    temporary = published.with_name(f".{published.name}")

    def work() -> None:
        delete(temporary)
        if not published.parent.is_dir():  # only this one is created: a run directory that was deleted must not reappear
            os.mkdir(published.parent)
            sync_directory(published.parent.parent)
        os.mkdir(temporary)
        write(temporary)
        publish(temporary, published, about | {"files": seal(temporary)}, name)

    try:
        guarded(published, work)
    except UserError:
        with contextlib.suppress(OSError):
            delete(temporary)
        raise


def seal(path: Path) -> dict[str, Any]:
    """Make all files in a directory durable, whoever wrote them. Returns their entries in a manifest."""
    entries: dict[str, Any] = {}
    for file in sorted(path.rglob("*")):
        sync_file(file)
        if file.is_file():
            entries[file.relative_to(path).as_posix()] = entry_of(file)
    return entries


def verify(path: Path, part: int = 0, parts: int = 1, name: str = MANIFEST, kind: str = "sha256") -> str | None:
    """What is wrong with a published directory, or None.

    Args:
        part, parts: only every ``parts``-th file is checked, from number ``part`` on; ranks share the work this way.
        name: of the manifest's file.
        kind: the hash to check, one of ``HASHES``; SHA-256 where the manifest does not have it.
    """
    try:
        manifest = read_manifest(path, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} cannot be read ({error})"
    number = path.name.rpartition("-")[2]
    if number.isdigit() and int(number) != manifest["step"]:
        return f"{name} says step {manifest['step']}"
    for file_name, entry in list(manifest["files"].items())[part::parts]:
        if problem := damage(path / file_name, entry, name, kind):
            return f"{file_name} {problem}"
    return None


def damage(file: Path, entry: dict[str, Any], manifest: str, kind: str = "sha256") -> str | None:
    """What is wrong with a file, by its entry in a manifest; None if nothing is."""
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, but {manifest} says {entry['bytes']}"
        kind = kind if kind in entry else "sha256"
        return None if hash_file(file, kind) == entry[kind] else f"does not have the {HASH_NAMES[kind]} that {manifest} says"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def published_directories(root: Path, prefix: str) -> list[Path]:
    """Published directories ``PREFIX-00000120``, oldest first."""
    return sorted(path for path in root.glob(f"{prefix}-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit())


def remove(path: Path) -> None:
    """Delete a published directory. It is renamed first, so that one deleted halfway does not look damaged."""
    doomed = path.with_name(f".doomed-{path.name}")
    os.rename(path, doomed)
    delete(doomed)


def clear_leftovers(root: Path) -> None:
    """Create the directory ``root``, or delete the hidden leftovers of an interrupted job from it."""
    make_directory(root)
    for leftover in root.glob(".*"):
        delete(leftover)


def set_aside(path: Path, why: str) -> Path:
    """Rename a published directory to ``NAME.why``, so that it no longer counts as published. Returns its new path."""
    aside = path.with_name(f"{path.name}.{why}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    sync_directory(path.parent)
    return aside


def guarded(path: Path, work: Callable[[], Any]) -> Any:
    """Return ``work()``, turning errors of a disk that is full or not writable into the user's error.

    Args:
        path: what the error names where the cause names no file.
    """
    try:
        return work()
    except (OSError, SafetensorError, RuntimeError) as error:
        causes = [cause for cause in chain(error) if isinstance(cause, OSError)]
        reason = causes[-1].strerror if causes else str(error).splitlines()[0]
        file = next((cause.filename for cause in causes if cause.filename), path)
        hint = "free some space or take another run_dir"
        if any(isinstance(cause, FileNotFoundError) for cause in causes):
            hint = "it or its directory was deleted or moved while a run used it; restore it or take another run_dir"
        raise UserError(f"cannot write {file}: {reason}; {hint}, and start again") from error


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes, outermost first: torch wraps the error of a full disk in errors of its own."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def hash_file(path: Path, kind: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, HASHES[kind]).hexdigest()
