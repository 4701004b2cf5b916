"""Directories of files that are whole or not there: written through to the disk, hashed, published by one rename.

A directory carries a manifest with every file's size and SHA-256, and a hash of itself. The hash is of what was meant to be
written, taken on the way, so that a disk that tore or changed a file is found out when it is read.
"""

from __future__ import annotations

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
from distmerge.files.manifest import MANIFEST, as_json, entry_of, read_manifest, sealed

BUFFER_BYTES = 1 << 20

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""safetensors' names of dtypes."""


class DurableFile:
    """A new file: small writes are gathered, every byte is hashed, and closing it waits for the disk."""

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
            self._through(view)
        return len(view)

    def flush(self) -> None:
        self._through(memoryview(self.buffer))
        self.buffer = bytearray()

    def _through(self, view: memoryview) -> None:
        while len(view):
            view = view[os.write(self.descriptor, view) :]

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                self.flush()
                os.fsync(self.descriptor)
        finally:
            os.close(self.descriptor)

    @property
    def entry(self) -> dict[str, Any]:
        """What a manifest says of the file."""
        return {"bytes": self.size_bytes, "sha256": self.digest.hexdigest()}


def write_file(path: Path, content: Any) -> dict[str, Any]:
    """Write a file through to the disk; its manifest entry. Its name gives its format: .safetensors (a dict of tensors),
    .pt (torch) or .json."""
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
    """The safetensors format, tensor by tensor, without a copy of the whole."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for tensor in tensors.values():
        file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())


def read_file(path: Path) -> Any:
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
    """Write the manifest and give the directory its name. Only after this does it exist for anyone."""
    write_file(temporary / name, sealed(manifest))
    sync_directory(temporary)
    os.rename(temporary, published)
    sync_directory(published.parent)


def seal(path: Path) -> dict[str, Any]:
    """Manifest entries of files that others wrote into a directory, made durable."""
    entries: dict[str, Any] = {}
    for file in sorted(path.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        entries[file.name] = entry_of(file)
    return entries


def verify(path: Path, part: int = 0, parts: int = 1, name: str = MANIFEST) -> str | None:
    """What is wrong with a published directory, or None. With ``parts``, only every parts-th file is hashed, from ``part``
    on."""
    try:
        manifest = read_manifest(path, name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{name} cannot be read ({error})"
    if not path.name.endswith(f"-{manifest['step']:08}"):
        return f"{name} says step {manifest['step']}"
    for file_name, entry in list(manifest["files"].items())[part::parts]:
        if problem := damage(path / file_name, entry, name):
            return f"{file_name} {problem}"
    return None


def damage(file: Path, entry: dict[str, Any], manifest: str) -> str | None:
    """What is wrong with a file of which a manifest has an entry."""
    try:
        size = file.stat().st_size
        if size != entry["bytes"]:
            return f"has {size} bytes, {manifest} says {entry['bytes']}"
        return None if sha256(file) == entry["sha256"] else f"does not have the SHA-256 that {manifest} says"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def published_directories(root: Path, prefix: str) -> list[Path]:
    """Published directories ``PREFIX-00000120``, oldest first."""
    return sorted(path for path in root.glob(f"{prefix}-*") if path.is_dir() and path.name.rpartition("-")[2].isdigit())


def remove(path: Path) -> None:
    """Delete a published directory. Renamed first: a half-deleted one must not look like a damaged one."""
    doomed = path.with_name(f".doomed-{path.name}")
    os.rename(path, doomed)
    delete(doomed)


def delete(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        os.unlink(path)
        return
    for inside in sorted(path.iterdir()):
        delete(inside)
    os.rmdir(path)


def clear_leftovers(root: Path) -> None:
    """Make a directory of published ones, without what an interrupted job left in it."""
    root.mkdir(parents=True, exist_ok=True)
    for leftover in root.glob(".*"):
        delete(leftover)


def set_aside(path: Path, why: str) -> Path:
    """Take a directory out of the published ones under the name ``NAME.why``."""
    aside = path.with_name(f"{path.name}.{why}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    sync_directory(path.parent)
    return aside


def guarded(path: Path, work: Callable[[], Any]) -> Any:
    """``work()``, with a disk that is full or not writable as the user's error."""
    try:
        return work()
    except (OSError, SafetensorError, RuntimeError) as error:
        causes = [cause for cause in chain(error) if isinstance(cause, OSError)]
        reason = causes[-1].strerror if causes else str(error).splitlines()[0]
        raise UserError(f"cannot write {path}: {reason}; free some space or take another run_dir, and start again") from error


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from: torch wraps a full disk in errors of its own."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
