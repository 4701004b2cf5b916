"""The exact k-th largest magnitude from histograms of bit patterns, which add across blocks and tensors.

The bits of a non-negative float, read as an integer, are in the order of its value. Half precision has 2^15 such patterns:
one histogram is exact. Single precision takes two: of the upper 16 bits, then of the lower 16 within the bin that holds the
threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

LOW_BITS = 16
COARSE = 1 << 15
FINE = 1 << LOW_BITS
HALVES = (torch.bfloat16, torch.float16)


def patterns(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers, int16 or int32, in the order of ``|x|``: the bits of ``values``, which are numbers of ``dtype``, without the
    sign. float64 is ranked by its float32."""
    if dtype in HALVES:
        return values.to(dtype).view(torch.int16) & 0x7FFF
    return values.to(torch.float32).view(torch.int32) & 0x7FFFFFFF


def value_of(pattern: int, dtype: torch.dtype) -> float:
    """The number that has a pattern. The pattern -1, one below that of 0, stands for the number -1."""
    if pattern < 0:
        return -1.0
    if dtype in HALVES:
        return float(torch.tensor([pattern], dtype=torch.int16).view(dtype))
    return float(torch.tensor([pattern], dtype=torch.int32).view(torch.float32))


def levels(dtype: torch.dtype) -> int:
    """How many histograms are needed to find a threshold exactly."""
    return 1 if dtype in HALVES else 2


def histogram(bits: Tensor, level: int, levels: int, bins: list[int]) -> Tensor:
    """``[M, bins]`` int64 counts of ``bits [M, n]`` at a level; on the second, only of what lies in row m's ``bins[m]``."""
    if level == 0:
        index = bits >> LOW_BITS if levels == 2 else bits
        return torch.stack([torch.bincount(row, minlength=COARSE) for row in index])
    inside = [row[(row >> LOW_BITS) == bin] & (FINE - 1) for row, bin in zip(bits, bins, strict=True)]
    return torch.stack([torch.bincount(row, minlength=FINE) for row in inside])


def within(bits: Tensor, lows: list[int], window: int) -> tuple[Tensor, Tensor]:
    """Of ``bits [M, n]`` of single precision: ``[M]``, how many lie above row m's ``window`` coarse bins from ``lows[m]`` on;
    ``[M, window FINE]``, counts of those inside; int64."""
    above: list[Tensor] = []
    counts: list[Tensor] = []
    for row, low in zip(bits, lows, strict=True):
        offset = row - (low << LOW_BITS)
        above.append((offset >= window * FINE).sum())
        inside = offset[(offset >= 0) & (offset < window * FINE)]
        counts.append(torch.bincount(inside, minlength=window * FINE))
    return torch.stack(above), torch.stack(counts)


class Cut(NamedTuple):
    """A place in the descending order of one member's magnitudes.

    Attributes:
        bits: the pattern of the k-th largest.
        above: elements that are larger.
        equal: elements with this very pattern; the k-th is one of them.
    """

    bits: int
    above: int
    equal: int


def locate(counts: Tensor, k: int, above: int = 0) -> Cut:
    """The bin of ``counts [bins]`` in which the k-th largest lies, 1 <= k; ``above`` elements are larger than all bins."""
    at_least = counts.flip(0).cumsum(0) + above
    place = int(torch.searchsorted(at_least, k))
    assert place < len(counts), "k is at most the number of elements"
    index = len(counts) - 1 - place
    equal = int(counts[index])
    return Cut(index, int(at_least[place]) - equal, equal)


def refine(coarse: Cut, counts: Tensor, k: int) -> Cut:
    """The exact cut, from the second histogram in the coarse cut's bin."""
    fine = locate(counts, k, coarse.above)
    return Cut((coarse.bits << LOW_BITS) + fine.bits, fine.above, fine.equal)
