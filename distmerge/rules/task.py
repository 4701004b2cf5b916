"""Task arithmetic and its descendants: ``base + scale * combine(sparsify(theta_m - base))``.

Task arithmetic https://arxiv.org/abs/2212.04089, TIES https://arxiv.org/abs/2306.01708, DARE https://arxiv.org/abs/2311.03099,
DELLA https://arxiv.org/abs/2406.11617, Model Breadcrumbs https://arxiv.org/abs/2312.06795. The papers and the tools that carry
their names differ in details that change the result; each such detail is an option here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmerge.rules.rule import Block, Measured, Rule, Tally, deltas, wide
from distmerge.rules.sparsify import AtRandom, ByMagnitude, Magprune, Trim
from distmerge.rules.threshold import patterns

Sparsifier = ByMagnitude | AtRandom | Magprune
TINY = 1e-7


@dataclass(frozen=True)
class Combine:
    """How the sparsified task vectors become one.

    Attributes:
        elect: elect a sign for each element and merge only those that agree: by the sum "before" the weights are applied (the
            paper, PEFT), or "after" (mergekit); "none" merges all.
        on_cancel: the sign that a sum of exactly 0 elects: "positive" (mergekit, PEFT), or "zero", which nobody has (the
            paper's formula): the merged element is 0.
        divide: the merged sum by the "weights" of those that agree (mergekit), by their "count" (PEFT, the paper), or "none".
        scale: lambda, which multiplies the merged task vector.
    """

    elect: str = "none"
    on_cancel: str = "positive"
    divide: str = "none"
    scale: float = 1.0

    def __call__(self, delta: Tensor, weight: Tensor) -> Tensor:
        """``delta [M, n]``, which is used up, and ``weight [M, 1]`` of one dtype, to ``[n]``."""
        if self.elect == "before":
            agree = self.elected(delta)
            delta.mul_(weight)
        else:
            delta.mul_(weight)
            agree = self.elected(delta) if self.elect == "after" else None
        merged = (delta if agree is None else delta * agree).sum(0)
        if self.divide != "none":
            merged /= self.divisor(weight, agree, len(delta))
        return merged if self.scale == 1 else merged.mul_(self.scale)

    def elected(self, delta: Tensor) -> Tensor:
        """``[M, n]`` bool: which elements have the sign of their sum over the members."""
        total = delta.sum(0)
        if self.on_cancel == "zero":
            return (delta.sign() == total.sign()) & (delta != 0)
        return torch.where(total >= 0, delta > 0, delta < 0)

    def divisor(self, weight: Tensor, agree: Tensor | None, members: int) -> Tensor | float:
        if agree is None:
            if self.divide == "count":
                return float(members)
            total = weight.sum()
            return 1.0 if abs(total) < 1e-8 else total
        counted = agree.sum(0).to(weight.dtype) if self.divide == "count" else (weight * agree).sum(0)
        return counted.masked_fill_(counted == 0, 1)


class Settled(NamedTuple):
    """What the passes over a tensor found: its thresholds, and the factors of the rescaling, ``[M, 1]``."""

    trim: Trim | None = None
    factor: Tensor | None = None


class TaskVectors(Rule):
    """The rule of the whole family.

    Args:
        weights: one for each member.
        combine: how they become one.
        sparsifier: None keeps all elements.
        rescale: the sparsified vector by "inverse", one over the probability to be kept (the DARE paper, PEFT), to the same
            "l1" norm as before (mergekit), or "none".
        dtype: of the arithmetic.
        numel, unit: the tensor's elements, and those that a block must not divide.
    """

    def __init__(
        self, weights: list[float], combine: Combine, sparsifier: Sparsifier | None, rescale: str, dtype: torch.dtype,
        numel: int, unit: int = 1,
    ):  # fmt: skip
        self.weights, self.combine, self.sparsifier, self.rescale = weights, combine, sparsifier, rescale
        self.dtype, self.numel, self.unit = dtype, numel, unit
        self.trims = sparsifier.passes if isinstance(sparsifier, ByMagnitude) else 0
        self.passes = self.trims + (rescale == "l1" and sparsifier is not None)

    def measure(self, step: int, block: Block, state: Settled | None) -> Measured:
        _, delta = deltas(block, self.dtype)
        if step < self.trims:
            assert isinstance(self.sparsifier, ByMagnitude)
            return self.sparsifier.measure(step, delta, state.trim if state else None)
        size = delta.abs()
        left = size * self.mask(delta, block, state)
        return Measured(kept={"norms": torch.stack([size.sum(1, dtype=wide(self.dtype)), left.sum(1, dtype=wide(self.dtype))])})

    def settle(self, step: int, tally: Tally, state: Settled | None) -> Settled:
        if step < self.trims:
            assert isinstance(self.sparsifier, ByMagnitude)
            return Settled(self.sparsifier.settle(step, tally, state.trim if state else None, self.numel))
        before, after = tally.total("norms").to(rescaling_dtype(self.dtype))
        factor = torch.where((before < TINY) | (after < TINY), torch.ones_like(before), before / after)
        return Settled(state.trim if state else None, factor.unsqueeze(1))

    def merge(self, block: Block, state: Settled | None) -> Tensor:
        base, delta = deltas(block, self.dtype)
        if self.sparsifier is not None:
            delta = self.thinned(delta, block, state)
        weight = torch.tensor(self.weights, dtype=self.dtype, device=delta.device).unsqueeze(1)
        return base + self.combine(delta, weight)

    def thinned(self, delta: Tensor, block: Block, state: Settled | None) -> Tensor:
        """The task vectors with what is dropped set to 0, rescaled."""
        delta *= self.mask(delta, block, state)
        if state is not None and state.factor is not None:
            return (delta.to(rescaling_dtype(self.dtype)) * state.factor.to(delta.device)).to(self.dtype)
        if self.rescale == "inverse" and not isinstance(self.sparsifier, ByMagnitude | None):
            delta = self.unmasked_odds(delta, block)
        return delta

    def unmasked_odds(self, delta: Tensor, block: Block) -> Tensor:
        assert isinstance(self.sparsifier, AtRandom | Magprune)
        if isinstance(self.sparsifier, AtRandom):
            return delta.div_(self.sparsifier.odds(delta))
        return delta.div_(self.sparsifier.odds(deltas(block, self.dtype)[1]))

    def mask(self, delta: Tensor, block: Block, state: Settled | None) -> Tensor:
        if isinstance(self.sparsifier, ByMagnitude):
            assert state is not None and state.trim is not None
            return state.trim.masks(delta, block.index)
        assert self.sparsifier is not None
        return self.sparsifier.mask(delta, block.start)


def rescaling_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 is drawn and rescaled in float32: its sums would overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


class GlobalTrim(Rule):
    """Task vectors trimmed by thresholds for the whole model, which a survey has found.

    Args:
        thresholds: one bit pattern for each member, filled in before the merge; what is equal to it is kept.
    """

    def __init__(self, weights: list[float], combine: Combine, thresholds: list[int]):
        self.weights, self.combine, self.thresholds = weights, combine, thresholds

    def merge(self, block: Block, state: Any) -> Tensor:
        base, delta = deltas(block, torch.float32)
        bars = torch.tensor(self.thresholds, dtype=torch.int32, device=delta.device).unsqueeze(1)
        delta *= patterns(delta) >= bars
        weight = torch.tensor(self.weights, dtype=torch.float32, device=delta.device).unsqueeze(1)
        return base + self.combine(delta, weight)


class Ptm(Rule):
    """``theta_G + sum_m omega_m (theta_m - base)``: the skills, trained from the base, are added to a general model.

    The general model is the first member. Source: https://arxiv.org/abs/2410.12937
    """

    def __init__(self, omegas: list[float], dtype: torch.dtype = torch.float32):
        self.omegas, self.dtype = omegas, dtype

    def merge(self, block: Block, state: Any) -> Tensor:
        assert block.base is not None
        base = block.base.to(self.dtype)
        merged = block.members[0].to(self.dtype, copy=True)
        for member, omega in zip(block.members[1:], self.omegas, strict=True):
            merged.add_(member.to(self.dtype) - base, alpha=omega)
        return merged
