"""Merges whose weights come from the models themselves: Model Stock from the angles, SCE from the variances."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmerge.rules.protocol import Block, Measured, Rule, Tally, deltas, total_norm, wide
from distmerge.rules.threshold import Cut, histogram, levels, locate, patterns, refine

TINY = 1e-6


class ModelStock(Rule):
    """``t mean + (1 - t) base``, ``t = N cos / (1 + (N - 1) cos)``, cos the mean cosine between pairs of task vectors.

    Args:
        columns: None for one cosine a tensor; the length of a row for one a row.
        floor: products of norms count as at least this (mergekit: 1e-6, which damps very small task vectors).

    Source: https://arxiv.org/abs/2403.19522. Where the denominator vanishes there is no estimate, and the base stays.
    """

    def __init__(self, members: int, columns: int | None, dtype: torch.dtype, floor: float):
        self.members, self.columns, self.dtype, self.floor = members, columns, dtype, floor
        self.unit, self.passes = columns or 1, 0 if columns else 1
        self.pairs = [(i, j) for i in range(members) for j in range(i + 1, members)]

    def products(self, block: Block) -> tuple[Tensor, Tensor]:
        """``[M, rows or 1]`` norms and ``[pairs, rows or 1]`` products of the task vectors, of each row where rows count."""
        delta = deltas(block, self.dtype)[1].to(self.dtype)
        rows = delta.view(len(delta), -1, self.columns) if self.columns else delta.unsqueeze(1)
        dots = [(rows[i] * rows[j]).sum(-1, dtype=wide(self.dtype)) for i, j in self.pairs]
        return torch.linalg.vector_norm(rows, dim=-1, dtype=wide(self.dtype)), torch.stack(dots)

    def measure(self, step: int, block: Block, state: Any) -> Measured:
        norms, dots = self.products(block)
        return Measured(kept={"norms": norms, "dots": dots})

    def settle(self, step: int, tally: Tally, state: Any) -> Tensor:
        return self.ratio(total_norm(tally, "norms"), tally.total("dots"))

    def ratio(self, norm: Tensor, dots: Tensor) -> Tensor:
        """``[rows or 1, 1]``: t."""
        norm, dots = norm.to(self.dtype), dots.to(self.dtype)
        cosines = [
            (dot / (norm[i] * norm[j]).clamp(min=self.floor)).clamp(-1, 1) for dot, (i, j) in zip(dots, self.pairs, strict=True)
        ]
        cosine = torch.stack(cosines).mean(0).unsqueeze(-1)
        below = 1 + (self.members - 1) * cosine
        flat = below.abs() < TINY
        return torch.where(flat, torch.zeros_like(cosine), self.members * cosine / torch.where(flat, 1.0, below))

    def merge(self, block: Block, state: Any) -> Tensor:
        assert block.base is not None
        if self.columns:
            state = self.ratio(*self.products(block))
        shape = (-1, self.columns) if self.columns else (1, -1)
        base = block.base.to(self.dtype).view(shape)
        mean = block.members[0].to(self.dtype)
        for member in block.members[1:]:
            mean = mean + member.to(self.dtype)
        return (state * (mean / self.members).view(shape) + (1 - state) * base).view(-1)


class SceState(NamedTuple):
    """Attributes: the cut through the variances; how many equal it before each block; the members' coefficients ``[M, 1]``."""

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

    def __init__(self, select: float, numel: int, dtype: torch.dtype):
        self.select, self.numel, self.dtype = select, numel, dtype
        self.levels = levels(dtype)
        self.picks = self.levels + 1 if 0 < select < 1 else 0
        self.passes = self.picks + 1

    def measure(self, step: int, block: Block, state: SceState | None) -> Measured:
        delta = deltas(block, self.dtype)[1].to(self.dtype)
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
        """``[n]``: patterns of the variance between the members."""
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
        base, delta = (x.to(self.dtype) for x in deltas(block, self.dtype))
        delta = self.kept(delta, block.index, state)
        agree = torch.where(delta.sum(0) >= 0, delta > 0, delta < 0)
        assert state.coefficients is not None
        weight = state.coefficients.to(delta.device) * agree
        return base + (delta * weight).sum(0) / weight.sum(0).clamp(min=TINY)
