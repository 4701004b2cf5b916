"""Finds where each tensor lies in PyTorch's pickled checkpoints, which are memory-mapped with weights_only and not loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from distmerge.errors import UserError
from distmerge.files.header import Stored
from distmerge.files.sources import NAMES


def as_stored(files: list[Path]) -> dict[str, Stored]:
    """Every tensor in ``files`` as a byte range of its file, by name.

    Raises:
        UserError: for a file that is not a zip checkpoint of contiguous tensors, or a name that two files hold.
    """
    found: dict[str, Stored] = {}
    for path in files:
        try:
            table: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds of errors for a bad file
            raise UserError(f"cannot read {path} with weights_only: {str(error).strip().splitlines()[0][:120]}") from None
        for name, tensor in table.items() if isinstance(table, dict) else [("", None)]:
            if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_contiguous():
                raise UserError(f"{path} must be a dict of contiguous tensors by name, got {name!r}")
            if name in found:
                raise UserError(f"{path} holds {name}, which {found[name].file} holds as well")
            if tensor.dtype not in NAMES:
                raise UserError(f"{path}: {name} has the dtype {tensor.dtype}, which is not supported")
            size = tensor.numel() * tensor.element_size()
            start = offset_in(path, tensor.data_ptr()) if size else 0
            found[name] = Stored(path, NAMES[tensor.dtype], tuple(tensor.shape), start, start + size)
    return found


def offset_in(path: Path, address: int) -> int:
    """The offset in its file of a mapped address, from the kernel's list of this process's memory maps."""
    real = os.path.realpath(path)
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, _, offset, _, _, *name = line.split(maxsplit=5)
            first, last = (int(bound, 16) for bound in span.split("-"))
            if first <= address < last and name and name[0].strip() == real:
                return address - first + int(offset, 16)
    raise AssertionError(f"{path} is not mapped at the address of its tensor")
