"""The weighted mean of the members, and the weights of workers that trained on different amounts of data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmerge.rules.protocol import Block, Rule


class WeightedMean(Rule):
    """``sum_m w_m theta_m``, divided by ``sum_m w_m`` with ``normalize``.

    The sum is taken in the weights' dtype: float32, or float64 for such members.

    Source: Model soups, https://arxiv.org/abs/2203.05482
    """

    linear = True

    def __init__(self, weights: list[float], normalize: bool = True, dtype: torch.dtype = torch.float32):
        self.weights = torch.tensor(weights, dtype=dtype)
        self.divisor = self.weights.sum() if normalize else None

    @property
    def coefficients(self) -> Tensor:
        return self.weights if self.divisor is None else self.weights / self.divisor

    def merge(self, block: Block, state: Any) -> Tensor:
        merged = weighted_sum(block.members, self.weights)
        return merged if self.divisor is None else merged.div_(self.divisor.to(merged.device))


def weighted_sum(members: list[Tensor], weights: Tensor) -> Tensor:
    """``[n]``: ``sum_m w_m x_m`` of members ``[n]``, in the dtype of ``weights [M]``."""
    first = members[0]
    total = torch.zeros(first.numel(), dtype=weights.dtype, device=first.device)
    for member, weight in zip(members, weights, strict=True):
        add_weighted(total, member, weight)
    return total


def add_weighted(total: Tensor, member: Tensor, weight: Tensor | float) -> None:
    """``total += weight * member``, one term of a weighted sum, in the dtype of ``total``; the member may lie elsewhere."""
    factor = torch.as_tensor(weight, dtype=total.dtype, device=total.device)
    total.addcmul_(member.to(total.device), factor)


def token_weight(tokens: float, steps: int) -> float:
    """``tokens^2 / steps``: this favours members that trained on more tokens, and on larger batches.

    Source: Decoupled DiLoCo, https://arxiv.org/abs/2604.21428
    """
    assert tokens >= 0 and steps >= 0
    return tokens * tokens / steps if steps else 0.0
