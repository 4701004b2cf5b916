"""Radial-directional averaging against its formula, stacked and over workers."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.rules.radial import radial_mean
from tests.ranks import Ranks

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


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_stacked(count: int) -> None:
    delta, weight = members(count)
    d = radial_mean(delta, weight, lambda x: x.sum(0), SEGMENTS, PLAIN)
    torch.testing.assert_close(d, formula(delta, weight), rtol=1e-9, atol=1e-12)


def test_the_norm_does_not_shrink_with_orthogonal_members() -> None:
    delta = torch.eye(8, dtype=torch.float64)
    d = radial_mean(delta, torch.ones(8, 1, dtype=torch.float64), lambda x: x.sum(0), [slice(0, 8)], [False])
    assert d.norm().item() == pytest.approx(1.0)
    assert delta.mean(0).norm().item() == pytest.approx(8**-0.5)


def test_members_that_cancel_out_take_their_mean() -> None:
    delta = torch.tensor([[1.0, 0.0, 2.0], [-3.0, 0.0, 2.0]], dtype=torch.float64)
    d = radial_mean(
        delta, torch.ones(2, 1, dtype=torch.float64), lambda x: x.sum(0), [slice(0, 2), slice(2, 3)], [False, False]
    )
    torch.testing.assert_close(d, torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64))


def over_workers(count: int) -> Tensor:
    delta, weight = members(count)
    own = slice(dist.get_rank(), dist.get_rank() + 1)

    def total(x: Tensor) -> Tensor:
        summed = x.sum(0)
        dist.all_reduce(summed)
        return summed

    return radial_mean(delta[own], weight[own], total, SEGMENTS, PLAIN)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_workers_are_stacked_members(ranks: Ranks, world: int) -> None:
    for d in ranks.run(world, over_workers, world):
        torch.testing.assert_close(d, formula(*members(world)), rtol=1e-9, atol=1e-12)
