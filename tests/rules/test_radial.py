"""Radial-directional averaging against its formula; tests/workers/test_rules.py has it over workers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distmerge.rules.mean import WeightedMean
from distmerge.rules.protocol import run
from distmerge.rules.radial import Radial

SEGMENTS = [slice(0, 5), slice(5, 6), slice(6, 40), slice(40, 40), slice(40, 57)]
PLAIN = [False, False, False, False, True]


def members(count: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    delta = torch.randn(count, 57, dtype=torch.float64)
    delta[0, 6:40] = 0  # a member without a direction
    return delta, torch.arange(1, count + 1, dtype=torch.float64).view(-1, 1)


def formula(delta: Tensor, weight: Tensor) -> Tensor:
    share = weight / weight.sum()
    d = (share * delta).sum(0)
    for part, plain in zip(SEGMENTS, PLAIN, strict=True):
        v = delta[:, part]
        norms = v.norm(dim=1, keepdim=True)
        unit = torch.where(norms > 0, v / norms, 0)
        direction = (share * unit).sum(0)
        if not plain and direction.norm() > 1e-6:
            d[part] = (share * norms).sum() * direction / direction.norm()
    return d


def by_tensor(delta: Tensor, weight: Tensor) -> Tensor:
    """The rule on every tensor, and the plain mean on embeddings."""
    weights = weight.flatten().tolist()
    rules = [WeightedMean(weights, dtype=torch.float64) if plain else Radial(weights, torch.float64) for plain in PLAIN]
    return torch.cat([run(rule, list(delta[:, part])) for rule, part in zip(rules, SEGMENTS, strict=True)])


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_it_is_its_formula(count: int) -> None:
    delta, weight = members(count)
    torch.testing.assert_close(by_tensor(delta, weight), formula(delta, weight), rtol=1e-9, atol=1e-12)


def test_the_norm_does_not_shrink_with_orthogonal_members() -> None:
    delta = torch.eye(8, dtype=torch.float64)
    assert run(Radial([1.0] * 8, torch.float64), list(delta)).norm().item() == pytest.approx(1.0)
    assert delta.mean(0).norm().item() == pytest.approx(8**-0.5)


def test_members_that_cancel_out_take_their_mean() -> None:
    one, two = torch.tensor([1.0, 0.0], dtype=torch.float64), torch.tensor([-3.0, 0.0], dtype=torch.float64)
    merged = run(Radial([1.0, 1.0], torch.float64), [one, two])
    torch.testing.assert_close(merged, torch.tensor([-1.0, 0.0], dtype=torch.float64))
