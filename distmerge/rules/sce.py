"""SCE selects elements by variance, weighs task vectors by energy, and erases elements of the minority's sign."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distmerge.rules.protocol import Block, Measured, Rule, Tally, deltas, wide
from distmerge.rules.threshold import Cut, histogram, levels, locate, patterns, refine

TINY = 1e-6


class SceState(NamedTuple):
    """What the passes found.

    Attributes:
        cut: the threshold among the variances.
        last: how many elements are selected.
        before: how many elements before each block equal the threshold, ``[blocks]``.
        coefficients: the members' weights, ``[M, 1]``.
    """

    cut: Cut | None = None
    last: int = 0
    before: Tensor | None = None
    coefficients: Tensor | None = None


class Sce(Rule):
    """Select the elements of highest variance between the task vectors, weigh each by its energy, erase minority signs.

    Of the elements whose variance is not 0, the ``select`` share of largest variance is kept (among equal ones, those first
    in the tensor). Coefficients are the mean squares of what is kept, normalised; where they vanish, equal. Elements against
    the sign of the sum are erased.

    Source: https://arxiv.org/abs/2408.07990
    """

    exact = False

    def __init__(self, select: float, numel: int, dtype: torch.dtype):
        self.select, self.numel, self.dtype = select, numel, dtype
        self.levels = levels(dtype)
        self.picks = self.levels + 1 if 0 < select < 1 else 0
        self.passes = self.picks + 1

    def measure(self, step: int, block: Block, state: SceState | None) -> Measured:
        delta = deltas(block, self.dtype)[1]
        if step < self.picks:
            bits = self.variances(delta).unsqueeze(0)
            if step == 0:
                return Measured(added={"0": histogram(bits, 0, self.levels, []), "live": (bits > 0).sum()})
            assert state is not None
            bin = state.cut.bits if state.cut else -1
            if step < self.levels:
                return Measured(added={"0": histogram(bits, 1, 2, [bin])})
            return Measured(kept={"equal": (bits == bin).sum()})
        kept = self.kept(delta, block.index, state)
        return Measured(kept={"energy": kept.square().sum(1, dtype=wide(self.dtype))})

    def settle(self, step: int, tally: Tally, state: SceState | None) -> SceState:
        if step == 0 and self.picks:
            k = int(int(tally.added["live"]) * self.select)
            return SceState(locate(tally.added["0"][0], k) if k else None, k)
        if step < self.levels and self.picks:
            assert state is not None
            return state._replace(cut=refine(state.cut, tally.added["0"][0], state.last)) if state.cut else state
        if step < self.picks:
            assert state is not None
            equal = tally.blocks("equal")
            return state._replace(before=equal.cumsum(0) - equal)
        energy = (tally.total("energy") / self.numel).to(self.dtype)
        total = energy.sum()
        share = torch.ones_like(energy) / len(energy) if abs(float(total)) < TINY else energy / total
        return (state or SceState())._replace(coefficients=share.unsqueeze(1))

    def variances(self, delta: Tensor) -> Tensor:
        """``[n]``: the bit patterns of each element's variance between the members."""
        return patterns(delta.var(0, unbiased=False).to(wide(self.dtype)), self.dtype)

    def kept(self, delta: Tensor, index: int, state: SceState | None) -> Tensor:
        """The task vectors, with what is not selected set to 0."""
        if not self.picks:
            return delta if self.select >= 1 else torch.zeros_like(delta)
        assert state is not None and state.before is not None
        if state.cut is None:
            return torch.zeros_like(delta)
        bits = self.variances(delta)
        equal = bits == state.cut.bits
        early = equal.cumsum(0) - 1 + int(state.before[index]) < state.last - state.cut.above
        return delta * ((bits > state.cut.bits) | (equal & early))

    def merge(self, block: Block, state: SceState) -> Tensor:
        base, delta = deltas(block, self.dtype)
        delta = self.kept(delta, block.index, state)
        agree = torch.where(delta.sum(0) >= 0, delta > 0, delta < 0)
        assert state.coefficients is not None
        weight = state.coefficients.to(delta.device) * agree
        merged = (delta * weight).sum(0) / weight.sum(0).clamp(min=TINY)
        return merged if base is None else base + merged
