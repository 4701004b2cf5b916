"""What TIES spends its time on, by compiled code: ties.c, compiled when distmerge is installed, if there is a C compiler.

The plain forms are in threshold.py and task.py; here are the same numbers, to the bit, for float32 on a CPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from distmerge.rules import compiled
from distmerge.rules.compiled import all_at, at

FORM = 1
"""Of ties.c's functions, raised when they change; ties.c has the same."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled ties.c, if there is one."""
    coarse, fine = (c_int64, c_void_p, c_void_p), (c_int64, c_void_p, c_int64, c_void_p)
    elect = (c_int64, c_int64, POINTER(c_void_p), c_void_p, c_int, c_int, c_void_p, c_float, c_float, c_void_p)
    functions = {"ties_coarse": coarse, "ties_fine": fine, "ties_elect": elect}
    return compiled.library("distmerge.rules._ties", "ties_form", FORM, functions)


def count_coarse(row: Tensor, counts: Tensor) -> bool:
    """Add to ``counts [32768]`` int64 how many of ``row [n]``, the int32 bits of floats, have each upper half; False where
    there is no code for it."""
    fast = library() if suits(row, torch.int32) else None
    if fast is not None:
        fast.ties_coarse(len(row), at(row), at(counts))
    return fast is not None


def count_fine(row: Tensor, bin: int, counts: Tensor) -> bool:
    """The same of the lower halves, ``counts [65536]``, of what has the upper half ``bin``."""
    fast = library() if suits(row, torch.int32) else None
    if fast is not None:
        fast.ties_fine(len(row), at(row), bin, at(counts))
    return fast is not None


def elect(
    rows: Sequence[Tensor], weights: Sequence[float], after: bool, strict: bool, shares: Sequence[float] | None, scale: float
) -> Tensor | None:
    """The sum of what has the elected sign, of task vectors ``[n]``; None where there is no code for it.

    Args:
        after: whether the weights are applied before the election.
        strict: whether a sum of 0 elects nobody.
        shares: what each vector counts for in the divisor; None where the sum is not divided.
    """
    fast = library() if all(suits(row, torch.float32) for row in rows) else None
    if fast is None:
        return None
    numbers = torch.tensor([weights, shares or weights], dtype=torch.float32)
    least = float(numbers[1].min()) if shares else 0.0
    out = torch.empty_like(rows[0])
    fast.ties_elect(
        len(out), len(rows), all_at(rows), at(numbers[0]), after, strict, at(numbers[1]) if shares else None, max(0.0, least),
        scale, at(out),
    )  # fmt: skip
    return out


def suits(row: Tensor, dtype: torch.dtype) -> bool:
    return row.device.type == "cpu" and row.dtype == dtype and row.is_contiguous()
