"""Means of deltas, stacked in one process and dealt to ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.rules.mean import token_weight, weighted_mean
from tests.ranks import Ranks

DELTAS = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))


def stacked(x: Tensor) -> Tensor:
    return x.sum(0)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 0.5, 1e-3], [0.0, 3.0, 0.0]])
def test_the_weighted_mean(weights: list[float]) -> None:
    expected = sum(weight * delta.double() for weight, delta in zip(weights, DELTAS, strict=True)) / sum(weights)
    result = weighted_mean(DELTAS, torch.tensor(weights).view(3, 1), stacked)
    assert result.shape == (11,)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


def in_a_rank(weights: list[float]) -> Tensor:
    def total(x: Tensor) -> Tensor:
        summed = x.sum(0)
        dist.all_reduce(summed)
        return summed

    rank = dist.get_rank()
    return weighted_mean(DELTAS[rank : rank + 1], torch.tensor([[weights[rank]]]), total)


def test_members_in_ranks_are_members_in_one_process(ranks: Ranks) -> None:
    weights = [2.0, 0.5, 1.0]
    expected = weighted_mean(DELTAS, torch.tensor(weights).view(3, 1), stacked)
    for result in ranks.run(3, in_a_rank, weights):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)


def test_token_weights() -> None:
    assert token_weight(100, 4) == 2500
    assert token_weight(100, 8) == 1250
    assert token_weight(0, 0) == 0.0, "a member that did nothing has no say"
