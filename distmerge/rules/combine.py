"""How sparsified task vectors become one: signs elected, sums taken, divided and scaled.

TIES https://arxiv.org/abs/2306.01708 and the tools that carry its name differ in details; each is an option here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.rules import ties
from distmerge.rules.protocol import INTEGERS, summed


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

    def __call__(self, delta: Tensor, weights: list[float]) -> Tensor:
        """``delta [M, n]``, used up, and M weights to ``[n]``, every step rounded to delta's dtype."""
        if weights == [1.0] and self == Combine():
            return delta[0]
        fast = self.compiled(list(delta), weights)
        if fast is not None:
            return fast
        weight = torch.tensor(weights, dtype=delta.dtype, device=delta.device).unsqueeze(1)
        if self.elect == "none":
            return self.finished(summed(delta.mul_(weight), len(delta)), weight, None)
        if self.elect == "after":
            delta = delta.mul_(weight)
        kept, sign = self.elected(delta)
        merged = summed(kept * weight if self.elect == "before" else kept, len(kept))
        bits(merged).bitwise_xor_(sign)
        return self.finished(merged, weight, kept)

    def compiled(self, rows: list[Tensor], weights: list[float]) -> Tensor | None:
        """The same numbers by ties.c; None where there is no such code. The rows are left as they are."""
        if self.elect == "none":
            return None
        shares = {"none": None, "count": [1.0] * len(rows), "weights": weights}[self.divide]
        return ties.elect(rows, weights, self.elect == "after", self.on_cancel == "zero", shares, self.scale)

    def finished(self, merged: Tensor, weight: Tensor, kept: Tensor | None) -> Tensor:
        """The sum ``merged [n]``, used up, divided and scaled; ``kept [M, n]`` is positive for those that agree, else 0."""
        if self.divide != "none":
            merged = merged.div_(self.divisor(weight, kept))
        return merged if self.scale == 1 else merged.mul_(self.scale)

    def elected(self, delta: Tensor) -> tuple[Tensor, Tensor]:
        """``[M, n]``: magnitudes of the elements that have the sign of their sum, 0 for the others; ``[n]``: that sign's bit.

        A float's first bit is its sign, so an integer's sign tells whether two of them differ.
        """
        total = bits(summed(delta, len(delta)).add_(0.0))  # adding 0 turns -0 into +0, which elects +
        sign = total & torch.iinfo(total.dtype).min
        kept = bits(delta).bitwise_xor_(sign).clamp_min_(0)
        if self.on_cancel == "zero":
            kept &= (-total.bitwise_and_(torch.iinfo(total.dtype).max)) >> WIDTH[kept.dtype]
        return delta, sign

    def divisor(self, weight: Tensor, kept: Tensor | None) -> Tensor | float:
        """The number, or ``[n]`` numbers, by which the sum is divided."""
        if kept is None:
            if self.divide == "count":
                return float(len(weight))
            total = weight.sum()
            return 1.0 if abs(total) < 1e-8 else total
        share = weight if self.divide == "weights" else torch.ones_like(weight)
        agree = (-bits(kept)).bitwise_right_shift_(WIDTH[INTEGERS[kept.dtype]])
        counted = summed(agree.bitwise_and_(bits(share)).view(kept.dtype), len(kept))
        # Where nobody counts the sum is 0, or a weight of 0 was divided by itself: any other number instead of 0.
        if bool((share > 0).all()):
            bits(counted).clamp_min_(int(bits(share).min()))
            return counted
        return counted.add_((counted == 0).to(counted.dtype))


WIDTH = {torch.int16: 15, torch.int32: 31, torch.int64: 63}


def bits(x: Tensor) -> Tensor:
    """The bits of the floats in ``x`` as integers, in the same memory."""
    return x.view(INTEGERS[x.dtype])
