"""Which elements of a task vector survive: the largest, those in the middle, a random draw, or a draw that favours large ones.

A sparsifier works on ``delta [M, n]``, one block of every member, each member with its own density, and sets what does not
survive to 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from distmerge.rules.protocol import INTEGERS, Measured, Tally
from distmerge.rules.random_masks import bar, below, chance
from distmerge.rules.threshold import Cut, ascending, histogram, levels, locate, patterns, refine, signed_patterns, value_of
from distmerge.rules.torch_typed import to_list


class Keep(NamedTuple):
    """The interval of magnitudes that one member keeps, and which of the elements that equal an end, by their order.

    Kept: ``low < bits < high``; of those equal to ``low``, the ones from ``first`` up to ``last`` in the tensor's order; of
    those equal to ``high``, the ones before ``last_high``. Where low is high, ``first`` and ``last`` alone decide.

    Example: of the magnitudes 1 3 2 3 1 3 two are to be kept after the very largest is left out. Equal ones rank by their
    place, so the largest is the last 3, and the other two survive: low = high = 3, and of the elements that equal it, counted
    0, 1, 2 along the tensor, those from first = 0 up to last = 2. Without gamma there is no upper end (high = 2^31), and the
    same two survive by the same first and last. A block counts on from the equal ones before it, and so decides alone.
    """

    low: int
    first: int
    last: int
    high: int
    last_high: int


ENDLESS = 1 << 62
ALL = Keep(-1, 0, ENDLESS, 1 << 31, 0)
NONE = Keep((1 << 31) - 1, 0, ENDLESS, 1 << 31, 0)


class Trim(NamedTuple):
    """What the passes have found out about a tensor's thresholds so far.

    Attributes:
        cuts: each member's places in the order of magnitudes.
        keeps: the intervals that follow.
        equal: how many elements of each block equal an interval's ends, ``[blocks, M, 2]``; None if it does not matter.
    """

    cuts: list[list[Cut]]
    keeps: list[Keep]
    equal: Tensor | None

    @property
    def sides(self) -> int:
        return max((len(row) for row in self.cuts), default=0)

    def bins(self, side: int) -> list[int]:
        return [row[side].bits if side < len(row) else -1 for row in self.cuts]

    def thin(self, delta: Tensor, dtype: torch.dtype, index: int) -> Tensor:
        """``delta [M, n]`` of block ``index``, with what does not survive set to 0."""
        rows: list[Tensor] = []
        for member, (row, keep) in enumerate(zip(delta, self.keeps, strict=True)):
            if keep is NONE:
                rows.append(torch.zeros_like(row))
                continue
            low = high = Among(0, 0)
            if self.equal is not None:
                counts = self.equal[:, member]
                before, here = to_list(counts[:index].sum(0)), to_list(counts[index])
                low, high = Among(before[0], here[0]), Among(before[1], here[1])
            kept = above(row, dtype, keep.low, keep.first, keep.last, low)
            if keep.high < 1 << 31:
                # Of the equal ones at the upper end the first are kept, so those that are not lie above it.
                kept = kept - above(row, dtype, keep.high, keep.last_high, ENDLESS, high)
            rows.append(kept)
        return rows[0].unsqueeze(0) if len(rows) == 1 else torch.stack(rows)


class Among(NamedTuple):
    """Where a block stands among the elements that equal a threshold: how many came before, how many it has itself."""

    before: int
    here: int


def above(row: Tensor, dtype: torch.dtype, pattern: int, first: int, last: int, among: Among) -> Tensor:
    """``row [n]`` where its magnitude is above the pattern's, or equals it with a place in [first, last); else 0."""
    if pattern < 0:
        return row
    if last <= among.before or first >= among.before + max(1, among.here) or (among.here == 0 and last < ENDLESS):
        return hardshrink(row, value_of(pattern, dtype))
    if first <= among.before and last >= among.before + among.here:
        return hardshrink(row, value_of(pattern - 1, dtype))
    equal = patterns(row, dtype) == pattern
    order = equal.cumsum(0) - 1 + among.before
    return hardshrink(row, value_of(pattern, dtype)) + row * (equal & (order >= first) & (order < last))


class ByMagnitude:
    """The ``density`` largest magnitudes of a tensor; with ``gamma``, after that share of the very largest is left out.

    ``k = max(1, floor(density n))`` are kept. ``on_tie`` says what becomes of magnitudes equal to the threshold: "first" keeps
    those that come first in the tensor, so that exactly k survive; "keep" keeps all of them. With gamma the interval of
    ascending ranks [n - k - floor(gamma n), n - floor(gamma n)) is kept (cut off at 0), equal magnitudes ranked by their place.

    Sources: TIES, https://arxiv.org/abs/2306.01708 (gamma None); Model Breadcrumbs, https://arxiv.org/abs/2312.06795
    """

    def __init__(self, density: list[float], gamma: list[float] | None, on_tie: str, dtype: torch.dtype):
        self.density, self.gamma, self.on_tie = density, gamma, on_tie
        self.dtype, self.levels = dtype, levels(dtype)
        self.passes = self.levels + (on_tie == "first")

    def of(self, member: int) -> ByMagnitude:
        """The same for one member alone."""
        gamma = None if self.gamma is None else [self.gamma[member]]
        return ByMagnitude([self.density[member]], gamma, self.on_tie, self.dtype)

    def ranks(self, numel: int) -> list[list[int]]:
        """The descending ranks (from 1) whose magnitudes must be known, for each member; [] where all or none is kept."""
        wanted: list[list[int]] = []
        for index, density in enumerate(self.density):
            if density >= 1 or numel == 0:
                wanted.append([])
            elif self.gamma is None:
                wanted.append([max(1, int(density * numel))])
            else:
                keep, top = int(density * numel), int(self.gamma[index] * numel)
                bottom = max(0, numel - keep - top)
                wanted.append([numel - bottom, numel - bottom - keep + 1] if keep else [])
        return wanted

    def measure(self, step: int, delta: Tensor, trim: Trim | None) -> Measured:
        bits = signed_patterns(delta, self.dtype)
        if step == 0:
            return Measured(added={"0": histogram(bits, 0, self.levels, [])})
        assert trim is not None
        if step < self.levels:
            return Measured(added={str(side): histogram(bits, 1, 2, trim.bins(side)) for side in range(trim.sides)})
        # How many equal the threshold, block by block: which of them are first is known before any block is merged.
        bits = patterns(delta, self.dtype)
        return Measured(
            kept={"equal": torch.tensor([equal_to_ends(row, keep) for row, keep in zip(bits, trim.keeps, strict=True)])}
        )

    def settle(self, step: int, tally: Tally, trim: Trim | None, numel: int) -> Trim:
        wanted = self.ranks(numel)
        if step == 0:
            cuts = [[locate(tally.added["0"][m], k) for k in ks] for m, ks in enumerate(wanted)]
        elif step < self.levels:
            assert trim is not None
            cuts = [
                [refine(trim.cuts[m][side], tally.added[str(side)][m], k) for side, k in enumerate(ks)]
                for m, ks in enumerate(wanted)
            ]
        else:
            assert trim is not None
            return trim._replace(equal=tally.blocks("equal"))
        return Trim(cuts, self.keeps(cuts, numel) if step == self.levels - 1 else [], None)

    def keeps(self, cuts: list[list[Cut]], numel: int) -> list[Keep]:
        """The interval of magnitudes that each member keeps."""
        found: list[Keep] = []
        for m, ks in enumerate(self.ranks(numel)):
            if not ks:
                found.append(ALL if self.density[m] >= 1 else NONE)
            elif self.gamma is None:
                cut = cuts[m][0]
                found.append(Keep(cut.bits, 0, ENDLESS if self.on_tie == "keep" else ks[0] - cut.above, 1 << 31, 0))
            else:
                found.append(self._between(ks, cuts[m]))
        return found

    def _between(self, ks: list[int], cuts: list[Cut]) -> Keep:
        low, high = cuts
        if self.on_tie == "keep":
            return Keep(low.bits, 0, ENDLESS, high.bits, ENDLESS)
        # Among equals the last in the tensor has the highest rank: descending rank r is number above + equal - r of them.
        first, last_high = low.above + low.equal - ks[0], high.above + high.equal - ks[1] + 1
        if low.bits == high.bits:
            return Keep(low.bits, first, last_high, low.bits, ENDLESS)
        return Keep(low.bits, first, ENDLESS, high.bits, last_high)


def equal_to_ends(bits: Tensor, keep: Keep) -> list[int]:
    """How many of ``bits [n]`` equal each end of the interval, where it matters."""
    low = count(bits, keep.low) if keep.first > 0 or keep.last < ENDLESS else 0
    return [low, count(bits, keep.high) if keep.last_high < ENDLESS and keep.high < 1 << 31 else 0]


def count(bits: Tensor, value: int) -> int:
    """How many of ``bits [n]`` are ``value``; on a CPU by numpy, which is ten times as fast."""
    return int(np.count_nonzero(bits.numpy() == value)) if bits.device.type == "cpu" else int((bits == value).sum())


class AtRandom:
    """DARE: each element is kept with probability ``density``, by a random number that depends on its position alone.

    Source: https://arxiv.org/abs/2311.03099
    """

    def __init__(self, density: list[float], keys: list[int]):
        self.density, self.keys = density, keys

    def of(self, member: int) -> AtRandom:
        """The same for one member alone, with its own draws."""
        return AtRandom([self.density[member]], [self.keys[member]])

    def thin(self, delta: Tensor, start: int, inverse: bool) -> Tensor:
        """``delta [M, n]`` from offset ``start`` on, in place, with what is not drawn set to 0; the rest is divided by
        its odds if ``inverse``."""
        kept = self.kept(start, delta.shape[1], delta.device)
        for row, mask, density in zip(delta, kept, self.density, strict=True):
            keep_bits(row, mask)
            if inverse:
                row.div_(density)
        return delta

    def kept(self, start: int, count: int, device: torch.device | str = "cpu") -> Iterator[Tensor]:
        """For each member ``[count]`` bool from offset ``start`` on: what is drawn."""
        return (chance(key, density, start, count, device) for key, density in zip(self.keys, self.density, strict=True))


def keep_bits(row: Tensor, mask: Tensor) -> None:
    """Set a row to 0 where the mask is false, in place. By bits: faster than a product or a selection."""
    bits = INTEGERS[row.dtype]
    row.view(bits).bitwise_and_(mask.to(bits).neg_())


class Magprune:
    """DELLA: each element is kept with a probability around ``density`` that grows with its magnitude's rank in its row.

    The probability goes linearly from ``density - half`` (the smallest) to ``density + half``; mergekit's epsilon is the half
    width, the paper's the whole. Blocks hold whole rows of ``columns``. It depends on the rank alone, and is computed once
    for each of the ``columns`` ranks.

    Attributes:
        odds: each member's probabilities by rank, ``[columns]``.

    Source: https://arxiv.org/abs/2406.11617
    """

    def __init__(self, density: list[float], half: list[float], keys: list[int], columns: int, dtype: torch.dtype):
        self.density, self.half, self.keys, self.columns, self.dtype = density, half, keys, columns, dtype
        working = torch.float32 if dtype == torch.float16 else dtype
        rank = torch.arange(columns).to(working) + 1
        # A row of one element has no order: 0/0 counts as the lowest.
        share = ((rank - rank[0]) / (rank[-1] - rank[0])).nan_to_num_(0.0).clamp_(0, 1)
        self.odds = [((one - width) + share * 2 * width) for one, width in zip(density, half, strict=True)]

    def of(self, member: int) -> Magprune:
        """The same for one member alone, with its own draws."""
        return Magprune([self.density[member]], [self.half[member]], [self.keys[member]], self.columns, self.dtype)

    def thin(self, delta: Tensor, start: int, inverse: bool) -> Tensor:
        """``delta [M, n]`` from offset ``start`` on, in place, with what is not drawn set to 0; the rest is divided by its
        odds if ``inverse``. Members of density 1 stay as they are."""
        for row, key, density, odds in zip(delta, self.keys, self.density, self.odds, strict=True):
            if density >= 1:
                continue
            order = ascending(patterns(row, self.dtype).view(-1, self.columns))
            keep_bits(row, below(key, start, by_rank(bar(odds), order)))
            if inverse:
                row.div_(by_rank(odds, order))
        return delta


def by_rank(values: Tensor, order: Tensor) -> Tensor:
    """``[rows * columns]``: at each element the one of ``values [columns]`` that belongs to its rank in its row."""
    found = torch.empty(order.shape, dtype=values.dtype, device=order.device)
    return found.scatter_(1, order, values.to(order.device).expand(order.shape)).view(-1)
