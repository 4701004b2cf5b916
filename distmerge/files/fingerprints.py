"""Fingerprints of files: their names, sizes and a hash of sampled blocks, so that even terabytes take only about a second.

They detect that a file was replaced, truncated or extended since a run began. They do not prove that every byte is the same,
since the bytes between the sampled blocks are not read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

BLOCK_BYTES = 64 << 10
BLOCKS = 16
"""Blocks sampled from each file, at fixed positions that include its first and last bytes. Shorter files are read whole."""

BUDGET_BLOCKS = 4096
"""Blocks sampled from all files together, 256 MiB. With more than 256 files each gives fewer blocks; with more than 4096 only
every n-th file gives one."""


def fingerprints(files: Mapping[str, Path]) -> dict[str, list[Any]]:
    """``[bytes, sample]`` of every file, by its name; the sample is None for the files that the budget leaves out.

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
    """A hash, in hexadecimal, of ``blocks`` blocks spread evenly over a file."""
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
    """What has changed between two fingerprints of a set of files: one phrase for each file that differs."""
    said = [f"{name} is gone" for name in then if name not in now]
    said += [f"{name} is new" for name in now if name not in then]
    same_set = not said
    for name in (name for name in then if name in now):
        (size, old), (size_now, new) = then[name], now[name]
        if size != size_now:
            said.append(f"{name} has {size_now:,} bytes and had {size:,}")
        elif same_set and old != new:  # the sampled positions depend on the number of files
            said.append(f"{name} has other content")
    return said
