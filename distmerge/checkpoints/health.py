"""Checks that a checkpoint is finite before it is committed or restored: parameters, moments and the mergers' states.

A checkpoint with one NaN is worse than none: retention would delete a good one in its favor, and a roll-back would trust it.
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
    """The path, in nested state, of the first tensor with a value that is not finite; None if all are finite.

    For example ``not_finite({"outer": {"velocity": torch.tensor(nan)}})`` is ``"outer.velocity"``.
    """
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
    """The first tensor with a NaN or an infinity in a checkpoint's files, given as ``(name, content)``; None if there is none.

    In a model's buffers only NaN counts, since masks may hold infinities. Of a rank's state only the mergers' part is checked:
    a block of the window that is in progress is checked when it ends.
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
    """:func:`unsound` for a published checkpoint whose hashes verify.

    Args:
        part, parts: check only every ``parts``-th file from file ``part`` on, to share the work among ranks.
    """
    names = [name for name in read_manifest(path)["files"] if name.startswith(("parameters-", "optimizer-", "rank-"))]
    return unsound((name, read_file(path / name)) for name in names[part::parts])
