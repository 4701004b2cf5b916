"""The exact k-th largest magnitude from histograms of bit patterns, which add across blocks and tensors.

The bits of a non-negative float, read as an integer, are in the order of its value. Half precision has 2^15 such patterns:
one histogram is exact. Single precision takes two: of the upper 16 bits, then of the lower 16 within the bin that holds the
threshold.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distmerge.rules import ties
from distmerge.rules.torch_typed import from_numpy

LOW_BITS = 16
COARSE = 1 << 15
FINE = 1 << LOW_BITS
HALVES = (torch.bfloat16, torch.float16)


def patterns(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Integers, int16 or int32, in the order of ``|x|``: the bits of ``values``, which are numbers of ``dtype``, without the
    sign. float64 is ranked by its float32."""
    if dtype in HALVES:
        return values.to(dtype).view(torch.int16) & 0x7FFF
    return unsigned(values.to(torch.float32).view(torch.int32))


def signed_patterns(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for :func:`histogram` alone, which passes over the sign: single precision is not copied."""
    return patterns(values, dtype) if dtype in HALVES or values.dtype != torch.float32 else values.view(torch.int32)


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
    """``[M, bins]`` int64 counts of ``bits [M, n]`` at a level; on the second, only of what lies in row m's ``bins[m]``. Signs
    among int32 bits don't count."""
    counts = torch.zeros((len(bits), FINE if level else COARSE), dtype=torch.int64, device=bits.device)
    for index, (row, into) in enumerate(zip(bits, counts, strict=True)):
        if level:
            if not ties.count_fine(row, bins[index], into):
                size = unsigned(row)
                into.add_(torch.bincount(size[size >> LOW_BITS == bins[index]] & (FINE - 1), minlength=FINE))
        elif levels == 1:
            into.add_(torch.bincount(row, minlength=COARSE))
        elif not ties.count_coarse(row, into):
            into.add_(torch.bincount(unsigned(row) >> LOW_BITS, minlength=COARSE))
    return counts


def unsigned(bits: Tensor) -> Tensor:
    return bits & 0x7FFFFFFF


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


def ascending(size: Tensor) -> Tensor:
    """``[rows, columns]`` int64: where in its row the smallest is, the next, ...; of equal ones the first comes first.

    Args:
        size: ``[rows, columns]`` int32, not negative.
    """
    if size.device.type != "cpu":
        return size.argsort(dim=1, stable=True)
    # numpy sorts 16 bits by radix, eight times as fast as a comparing sort: the lower halves first, if there are upper ones.
    if int(size.max()) < 1 << (31 - LOW_BITS):
        return argsort(size)
    order = argsort((size & (FINE - 1)) - FINE // 2)
    return order.gather(1, argsort((size >> LOW_BITS).gather(1, order)))


def argsort(digits: Tensor) -> Tensor:
    """``[rows, columns]`` int64 of integers that fit 16 bits, on a CPU."""
    return from_numpy(digits.to(torch.int16).numpy().argsort(axis=1, kind="stable"))
