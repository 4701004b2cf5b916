"""The weighted mean, and the weights of members that trained on different amounts of data."""

from __future__ import annotations

import pytest
import torch

from distmerge.rules.mean import WeightedMean, token_weight
from distmerge.rules.protocol import run

DELTAS = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [2.0, 0.5, 1e-3], [0.0, 3.0, 0.0]])
def test_the_weighted_mean(weights: list[float]) -> None:
    expected = sum(weight * delta.double() for weight, delta in zip(weights, DELTAS, strict=True)) / sum(weights)
    result = run(WeightedMean(weights), list(DELTAS))
    assert result.shape == (11,)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


def test_token_weights() -> None:
    assert token_weight(100, 4) == 2500
    assert token_weight(100, 8) == 1250
    assert token_weight(0, 0) == 0.0, "a member that did nothing has no say"
