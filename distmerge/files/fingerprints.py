"""Fingerprints of files: sizes, names and a sample of their bytes, so that even terabytes cost a second.

They tell a file that was exchanged, cut, or grown from the one that a run began with. They do not prove that no byte differs:
what lies between the sampled blocks may.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 64 << 10
BLOCKS = 16
"""Of each file, at fixed positions, the first and the last bytes among them; a file that is no longer is read whole."""

BUDGET_BLOCKS = 4096
"""Of all files together, 256 MiB: of more than 256 files each gives fewer blocks, beyond 4096 only every n-th gives one."""


def fingerprints(files: Mapping[str, Path]) -> dict[str, list[Any]]:
    """``[bytes, sample]`` of every file by its name; the sample is None where the budget did not reach.

    Raises:
        OSError: for a file that cannot be read.
    """
    blocks = max(1, min(BLOCKS, BUDGET_BLOCKS // max(1, len(files))))
    share = min(1.0, BUDGET_BLOCKS / max(1, len(files)))
    found: dict[str, list[Any]] = {}
    for index, (name, path) in enumerate(files.items()):
        sampled = int((index + 1) * share) > int(index * share)
        found[name] = [os.stat(path).st_size, sample(path, blocks) if sampled else None]
    return found


def sample(path: Path, blocks: int) -> str:
    """A hash of blocks that are spread evenly over a file."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size <= blocks * BLOCK_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        for index in range(blocks):
            file.seek((size - BLOCK_BYTES) * index // max(1, blocks - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def differences(then: Mapping[str, list[Any]], now: Mapping[str, list[Any]]) -> list[str]:
    """What has changed between two fingerprints of a set of files, in words, a phrase a file."""
    said = [f"{name} is gone" for name in then if name not in now]
    said += [f"{name} is new" for name in now if name not in then]
    same_set = not said
    for name in (name for name in then if name in now):
        (size, old), (size_now, new) = then[name], now[name]
        if size != size_now:
            said.append(f"{name} has {size_now:,} bytes and had {size:,}")
        elif same_set and old != new:  # the samples of another number of files lie elsewhere
            said.append(f"{name} has other content")
    return said
