"""What must be finite before it is committed, or gone back to: parameters, moments, and what the mergers keep.

A checkpoint that holds one NaN is worse than none: retention would let it take the place of a good one, and a roll-back
would trust it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from distmerge.files.directories import read_file
from distmerge.files.manifest import read_manifest
from distmerge.finite import finite, has_nan


def not_finite(value: Any, place: str = "") -> str | None:
    """Where in nested state the first tensor lies that holds a value that is not finite; None where there is none."""
    if isinstance(value, Tensor):
        return None if finite(value) else place
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        if found := not_finite(item, f"{place}.{key}" if place else str(key)):
            return found
    return None


def unsound(files: Iterable[tuple[str, Any]]) -> str | None:
    """What is wrong with a checkpoint's files, given as ``(name, content)``: the first one that holds a NaN or an infinity.

    Of a model's buffers only NaN counts, since masks may hold infinities; of a rank's state, what the mergers keep. A block
    in progress is judged at its own end.
    """
    for name, content in files:
        if name.startswith("rank-"):
            content = {"mergers": content.get("mergers", [])}
        elif name.startswith("parameters-"):
            buffers = {key: tensor for key, tensor in content.items() if key.startswith("buffer:")}
            for key, tensor in buffers.items():
                if has_nan(tensor):
                    return f"{name}: {key} holds values that are not finite"
            content = {key: tensor for key, tensor in content.items() if key not in buffers}
        if found := not_finite(content):
            return f"{name}: {found} holds values that are not finite"
    return None


def unsound_checkpoint(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """:func:`unsound` of a published checkpoint that verifies; with ``parts``, of every parts-th file from ``part`` on."""
    names = [name for name in read_manifest(path)["files"] if name.startswith(("parameters-", "optimizer-", "rank-"))]
    return unsound((name, read_file(path / name)) for name in names[part::parts])
