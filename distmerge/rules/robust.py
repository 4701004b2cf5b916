"""Robust coordinate-wise aggregation: the median and the trimmed mean, which a minority of bad members cannot move far.

Source: Yin et al. 2018, https://arxiv.org/abs/1803.01498. A NaN in any member gives NaN, since torch's minimum and maximum
propagate it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmerge.rules.protocol import Block, Rule, deltas, onto, wide

PIECE = 1 << 14
"""Elements sorted at a time. With 8 members they stay in a core's cache."""


class Comparator(NamedTuple):
    """One comparator of a sorting network: row ``low`` gets the smaller and row ``high`` the larger of their elements.

    Attributes:
        lower, upper: whether the row ``low``, or ``high``, is read afterwards; otherwise it need not be computed.
    """

    low: int
    high: int
    lower: bool
    upper: bool


@functools.cache
def network(members: int, first: int, stop: int) -> tuple[Comparator, ...]:
    """The comparators that put the elements of ranks ``first`` to ``stop - 1`` among ``members`` values into the rows of these
    numbers. Other rows hold undefined values afterwards.

    Batcher's odd-even merge sort (https://doi.org/10.1145/1468075.1468121), without the comparators that these ranks do not
    depend on. For example, the median of 3 members, rank 1, needs all three: (0, 1), (0, 2) with only the larger element
    kept, and (1, 2) with only the smaller one kept.
    """
    pairs: list[tuple[int, int]] = []
    p = 1
    while p < members:
        k = p
        while k >= 1:
            for j in range(k % p, members - k, 2 * k):
                for i in range(min(k, members - j - k)):
                    if (i + j) // (2 * p) == (i + j + k) // (2 * p):
                        pairs.append((i + j, i + j + k))
            k //= 2
        p *= 2
    wanted = set(range(first, stop))
    found: list[Comparator] = []
    for low, high in reversed(pairs):
        if low in wanted or high in wanted:
            found.append(Comparator(low, high, low in wanted, high in wanted))
            wanted |= {low, high}
    return tuple(reversed(found))


class RankMean(Rule):
    """The mean of the elements that are neither among the ``cut`` smallest nor among the ``cut`` largest."""

    def __init__(self, dtype: torch.dtype = torch.float32):
        self.dtype = dtype

    def cut(self, members: int) -> int:
        """How many members out of ``members`` are left out at each end."""
        raise NotImplementedError

    def merge(self, block: Block, state: Any) -> Tensor:
        base, delta = deltas(block, self.dtype)
        cut = self.cut(len(delta))
        first, stop = cut, len(delta) - cut
        steps = network(len(delta), first, stop)
        merged = torch.empty(delta.shape[1], dtype=wide(self.dtype), device=delta.device)
        size = PIECE if delta.device.type == "cpu" else delta.shape[1]
        for start in range(0, delta.shape[1], max(1, size)):
            rows = list(delta[:, start : start + size])
            spare = torch.empty_like(rows[0])
            for low, high, lower, upper in steps:
                smaller, larger = rows[low], rows[high]
                if lower:
                    torch.minimum(smaller, larger, out=spare)
                if upper:
                    torch.maximum(smaller, larger, out=larger)
                if lower:
                    rows[low], spare = spare, smaller
            out = merged[start : start + size].copy_(rows[first])
            for row in rows[first + 1 : stop]:
                out.add_(row)
            if stop - first > 1:
                out.div_(stop - first)
        return onto(base, merged)


class Median(RankMean):
    """The median of each coordinate; with an even number of members, the mean of the middle two. Weights are not used."""

    def cut(self, members: int) -> int:
        return (members - 1) // 2


class TrimmedMean(RankMean):
    """The mean of each coordinate without the ``trim`` share of the members at each end. Weights are not used.

    With three members or more, at least one is left out at each end, and at least one stays.
    """

    def __init__(self, trim: float, dtype: torch.dtype = torch.float32):
        assert 0 <= trim < 0.5
        super().__init__(dtype)
        self.trim = trim

    def cut(self, members: int) -> int:
        return 0 if members < 3 else min(max(1, int(self.trim * members)), (members - 1) // 2)
