"""Records that are published with files: what each file is, and a hash of the record itself. Imports no torch."""

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
    """What a record says of a file: its size and both hashes."""
    digests = {kind: new() for kind, new in HASHES.items()}
    size = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            size += len(piece)
            for digest in digests.values():
                digest.update(piece)
    return {"bytes": size} | {kind: digest.hexdigest() for kind, digest in digests.items()}


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with a hash of itself."""
    return record | {"sha256": hash_of(record)}


def read_manifest(path: Path, name: str = MANIFEST) -> dict[str, Any]:
    """A directory's record, which carries a hash of itself.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: where it is not as it was written.
    """
    written = (path / name).read_bytes()
    manifest = json.loads(written)
    if written != as_json(manifest):
        raise ValueError("it is not as it was written")
    stored = manifest.pop("sha256")
    if hash_of(manifest) != stored:
        raise ValueError("its own SHA-256 does not match")
    return manifest


def as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
