"""Task arithmetic and its descendants: ``base + scale * combine(sparsify(theta_m - base))``.

Task arithmetic https://arxiv.org/abs/2212.04089, TIES https://arxiv.org/abs/2306.01708, DARE https://arxiv.org/abs/2311.03099,
DELLA https://arxiv.org/abs/2406.11617, Model Breadcrumbs https://arxiv.org/abs/2312.06795. The papers and the tools that carry
their names differ in details that change the result; each such detail is an option here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from distmerge.rules.combine import Combine
from distmerge.rules.mean import add_weighted
from distmerge.rules.protocol import Block, Measured, Rule, Tally, deltas, deltas_to_read, onto, summed, wide
from distmerge.rules.sparsify import AtRandom, ByMagnitude, Magprune, Trim
from distmerge.rules.threshold import value_of
from distmerge.rules.torch_typed import to_list

Sparsifier = ByMagnitude | AtRandom | Magprune
TINY = 1e-7


class Settled(NamedTuple):
    """What the passes over a tensor found.

    Attributes:
        trim: its thresholds.
        factors: the factor by which each member is rescaled.
        finite: whether all elements are known to be finite.
    """

    trim: Trim | None = None
    factors: list[float] | None = None
    finite: bool = False


class TaskVectors(Rule):
    """The rule that the whole family shares.

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
        rescaled = rescale == "l1" and sparsifier is not None
        self.passes, self.exact = self.trims + rescaled, not rescaled

    @property
    def parts(self) -> tuple[list[Rule], Rule] | None:
        if self.sparsifier is None:
            return None
        members = range(len(self.weights))
        each = [
            type(self)([1.0], Combine(), self.sparsifier.of(member), self.rescale, self.dtype, self.numel, self.unit)
            for member in members
        ]
        return [*each], whole_vectors(self.weights, self.combine, self.dtype, self.numel)

    def measure(self, step: int, block: Block, state: Settled | None) -> Measured:
        if step < self.trims:
            assert isinstance(self.sparsifier, ByMagnitude)
            return self.sparsifier.measure(step, deltas_to_read(block, self.dtype), state.trim if state else None)
        _, delta = deltas(block, self.dtype)
        before = self.magnitude(delta.abs_())  # what survives depends on magnitudes and places alone
        after = self.magnitude(self.thinned(delta, block, state))
        return Measured(kept={"norms": torch.stack([before, after])})

    def settle(self, step: int, tally: Tally, state: Settled | None) -> Settled:
        if step < self.trims:
            assert isinstance(self.sparsifier, ByMagnitude)
            return Settled(self.sparsifier.settle(step, tally, state.trim if state else None, self.numel))
        before, after = tally.total("norms").to(rescaling_dtype(self.dtype))
        factor = torch.where((before < TINY) | (after < TINY), torch.ones_like(before), before / after)
        return Settled(state.trim if state else None, to_list(factor), bool(torch.isfinite(before).all()))

    def merge(self, block: Block, state: Settled | None) -> Tensor:
        whole = self.sparsifier is None and block.base is None
        if whole and (fast := self.combine.compiled(block.members, self.weights)) is not None:
            return fast
        base, delta = deltas(block, self.dtype)
        if self.sparsifier is not None:
            delta = self.thinned(delta, block, state)
            if state is not None and state.factors is not None:
                for row, factor in zip(delta, state.factors, strict=True):
                    row.mul_(factor)
        return onto(base, self.combine(delta, self.weights).to(wide(self.dtype)))

    def hides(self, state: Settled | None) -> bool:
        return self.sparsifier is not None and not (state is not None and state.finite)

    def magnitude(self, delta: Tensor) -> Tensor:
        """``[M]``: the sums of ``delta [M, n]``, where nothing is negative; of each row the same bits, whatever M is."""
        if len(delta) == 1 and torch.get_num_threads() > 1:
            # torch divides a single sum among its threads, and rows of several not.
            return torch.cat([delta, delta]).sum(1, dtype=wide(delta.dtype))[:1]
        return delta.sum(1, dtype=wide(delta.dtype))

    def thinned(self, delta: Tensor, block: Block, state: Settled | None) -> Tensor:
        """The task vectors with what is dropped set to 0; ``delta`` is used up."""
        if isinstance(self.sparsifier, ByMagnitude):
            assert state is not None and state.trim is not None
            return state.trim.thin(delta, self.dtype, block.index)
        assert self.sparsifier is not None
        return self.sparsifier.thin(delta, block.start, self.rescale == "inverse")


def rescaling_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype for drawing and rescaling: float32 instead of float16, whose sums would overflow."""
    return torch.float32 if dtype == torch.float16 else dtype


class TaskArithmetic(Rule):
    """``base + scale * sum_m w_m (theta_m - base)``: task vectors that are neither thinned nor elected, one after the other.

    The numbers that ``TaskVectors`` gives without a sparsifier, in a third of the time: no task vector outlives its turn, and
    half precision is computed as such.

    Source: https://arxiv.org/abs/2212.04089
    """

    linear = True

    def __init__(self, weights: list[float], combine: Combine, dtype: torch.dtype):
        assert combine.elect == "none"
        self.weights, self.combine, self.dtype = torch.tensor(weights, dtype=dtype), combine, dtype

    @property
    def coefficients(self) -> Tensor:
        return self.combine.finished(self.weights.clone(), self.weights.unsqueeze(1), None)

    def merge(self, block: Block, state: Any) -> Tensor:
        weights = self.weights.to(block.members[0].device)
        base = block.base.to(self.dtype) if block.base is not None else None
        vectors = (member.to(self.dtype) for member in block.members)
        if base is not None:
            vectors = (torch.sub(vector, base) for vector in vectors)
            parts = (vector.mul_(one) for vector, one in zip(vectors, weights, strict=True))
        else:
            parts = (vector * one for vector, one in zip(vectors, weights, strict=True))
        merged = self.combine.finished(summed(parts, len(weights)), weights.unsqueeze(1), None)
        return onto(base, merged.to(wide(self.dtype)))


def whole_vectors(weights: list[float], combine: Combine, dtype: torch.dtype, numel: int) -> Rule:
    """The rule for task vectors that are not thinned, which is elementwise."""
    if combine.elect == "none":
        return TaskArithmetic(weights, combine, dtype)
    return TaskVectors(weights, combine, None, "none", dtype, numel)


class GlobalTrim(Rule):
    """Task vectors trimmed by thresholds for the whole model, which a survey has found.

    Args:
        thresholds: one bit pattern for each member, filled in before the merge; what is equal to it is kept.
    """

    def __init__(self, weights: list[float], combine: Combine, thresholds: list[int]):
        self.weights, self.combine, self.thresholds = weights, combine, thresholds

    @property
    def parts(self) -> tuple[list[Rule], Rule] | None:
        each: list[Rule] = [GlobalTrim([1.0], Combine(), [threshold]) for threshold in self.thresholds]
        return each, whole_vectors(self.weights, self.combine, torch.float32, 0)

    def hides(self, state: Any) -> bool:
        return True

    def merge(self, block: Block, state: Any) -> Tensor:
        base, delta = deltas(block, torch.float32)
        bars = [value_of(bits - 1, torch.float32) for bits in self.thresholds]
        delta = torch.stack([hardshrink(row, bar) if bar >= 0 else row for row, bar in zip(delta, bars, strict=True)])
        return onto(base, self.combine(delta, self.weights))


class Ptm(Rule):
    """``theta_G + sum_m omega_m (theta_m - base)``: the skills, trained from the base, are added to a general model.

    The general model is the first member. Source: https://arxiv.org/abs/2410.12937
    """

    linear = True
    least = 2

    def __init__(self, omegas: list[float], dtype: torch.dtype = torch.float32):
        self.omegas, self.dtype = omegas, dtype

    @property
    def coefficients(self) -> Tensor:
        return torch.tensor([1.0, *self.omegas], dtype=self.dtype)

    def merge(self, block: Block, state: Any) -> Tensor:
        base = block.base.to(self.dtype) if block.base is not None else None
        merged = block.members[0].to(self.dtype, copy=True)
        for member, omega in zip(block.members[1:], self.omegas, strict=True):
            vector = member.to(self.dtype)
            add_weighted(merged, vector if base is None else vector - base, omega)
        return merged
