"""Weighted means of the members themselves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmerge.rules.protocol import Block, Rule


class Linear(Rule):
    """``sum_m w_m theta_m``, divided by ``sum_m w_m`` with ``normalize``. Sums in float32, or float64 for such members.

    Source: Model soups, https://arxiv.org/abs/2203.05482
    """

    def __init__(self, weights: list[float], normalize: bool = True, dtype: torch.dtype = torch.float32):
        self.weights = torch.tensor(weights, dtype=dtype)
        self.divisor = self.weights.sum() if normalize else None

    def merge(self, block: Block, state: Any) -> Tensor:
        first = block.members[0]
        weights = self.weights.to(first.device)
        merged = torch.zeros(first.numel(), dtype=weights.dtype, device=first.device)
        for member, weight in zip(block.members, weights, strict=True):
            merged.addcmul_(member, weight)
        return merged if self.divisor is None else merged.div_(self.divisor.to(first.device))


class Same(Rule):
    """For what cannot be averaged (integers, booleans): all members must be equal, and that is the result."""

    def merge(self, block: Block, state: Any) -> Tensor:
        first = block.members[0]
        others = block.members[1:] if block.base is None else [*block.members[1:], block.base]
        if not all(torch.equal(first, other) for other in others):
            raise ValueError("differs between the inputs, and is no floating point number to be merged")
        return first


class Scaled(Rule):
    """One member, times ``scale``: passthrough."""

    def __init__(self, scale: float | None, dtype: torch.dtype):
        self.scale, self.dtype = scale, dtype

    def merge(self, block: Block, state: Any) -> Tensor:
        (member,) = block.members
        return member if self.scale is None else member.to(self.dtype) * self.scale
