"""Manifests published with files: the size and hashes of each file, and a hash of the manifest itself. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import xxhash

MANIFEST = "manifest.json"

HASHES = {"sha256": hashlib.sha256, "xxh128": xxhash.xxh3_128}
HASH_NAMES = {"sha256": "SHA-256", "xxh128": "XXH128"}


def entry_of(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest: its size and both hashes."""
    digests = {kind: new() for kind, new in HASHES.items()}
    size = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            size += len(piece)
            for digest in digests.values():
                digest.update(piece)
    return {"bytes": size} | {kind: digest.hexdigest() for kind, digest in digests.items()}


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The manifest with a hash of itself added to it."""
    return record | {"sha256": hash_of(record)}


def read_manifest(path: Path, name: str = MANIFEST) -> dict[str, Any]:
    """Read a directory's manifest and check the hash of itself that it carries, which the result no longer holds.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: when it is damaged.
    """
    written = (path / name).read_bytes()
    manifest = json.loads(written)
    if written != as_json(manifest):
        raise ValueError("it was changed after it was written")
    stored = manifest.pop("sha256")
    if hash_of(manifest) != stored:
        raise ValueError("its own SHA-256 does not match")
    return manifest


def as_json(content: Any) -> bytes:
    """The one form in which JSON files are published."""
    return (json.dumps(content, indent=1) + "\n").encode()


def hash_of(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
