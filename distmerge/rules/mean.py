"""The mean of the members' deltas, plain and weighted."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""``[M, k] -> [k]``: the sum over all members, of which this process holds M."""


def weighted_mean(delta: Tensor, weight: Tensor, total: Total) -> Tensor:
    """``sum_m w_m delta_m / sum_m w_m``.

    Args:
        delta: ``[M, n]``, the members here.
        weight: ``[M, 1]``, not negative; their sum over all members must be positive.
        total: the sum over all members.

    Returns:
        ``[n]``, the same for every member. The weights ride in the same sum as the values.
    """
    summed = total(torch.cat([delta * weight, weight], dim=1))
    return summed[:-1] / summed[-1]


def token_weight(tokens: float, steps: int) -> float:
    """``tokens^2 / steps``: favours members that trained on more tokens, and on larger batches.

    Source: Decoupled DiLoCo, https://arxiv.org/abs/2604.21428
    """
    assert tokens >= 0 and steps >= 0
    return tokens * tokens / steps if steps else 0.0
