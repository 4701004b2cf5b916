"""What must not spread: what is in flight of parameters that were replaced, and the buffers of a worker of weight 0."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge import SPARTA, DiLoCo
from tests.ranks import Ranks
from tests.workers.loops import build

MERGERS: dict[str, Any] = {
    "overlap": lambda model: DiLoCo(model, every=4, overlap=3),
    "wire": lambda model: DiLoCo(model, every=2, wire="int4", error_feedback=True, outer_lr=1.0, outer_momentum=0.0),
    "exchange": lambda model: DiLoCo(model, every=4, overlap=3, wire="int4", error_feedback=True),
    "delay": lambda model: SPARTA(model, fraction=0.5, every=2, delay=3),
    "smoothed": lambda model: SPARTA(model, fraction=0.5, every=1, ema=0.5),
}


@torch.no_grad()
def restarted(kind: str) -> list[float]:
    """Workers go apart until something is in flight; then all take the same parameters, and none moves any more."""
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(16, 16)
    merger = MERGERS[kind](model)
    for _ in range(4):
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
        merger.step()
    for parameter in model.parameters():
        parameter.fill_(1.0)
    merger.restart()
    for _ in range(8):
        merger.step()
    return sorted({value.item() for parameter in model.parameters() for value in parameter.view(-1)})


@pytest.mark.parametrize("kind", MERGERS)
def test_after_a_restart_nothing_of_before_moves_the_parameters(ranks: Ranks, kind: str) -> None:
    assert ranks.run(2, restarted, kind) == [[1.0]] * 2


@torch.no_grad()
def abandoned(settings: dict[str, Any]) -> None:
    """A loop that ends in the middle of a round, without finish()."""
    model = build("one")
    merger = DiLoCo(model, every=4, overlap=3, **settings)
    for _ in range(5):
        merger.step()


@pytest.mark.parametrize("settings", [{"wire": "int8"}, {"wire": "int8", "rule": "sce"}, {"outer_sharded": True}])
def test_a_loop_that_ends_with_an_exchange_in_flight_leaves_a_group_that_can_be_destroyed(
    ranks: Ranks, settings: dict[str, Any]
) -> None:
    for _ in range(2):
        assert ranks.run(2, abandoned, settings, seconds=120) == [None, None]


@torch.no_grad()
def started_again(kind: str) -> bool:
    """Worker 1 is NaN when something is sent, counts for nothing, and takes other parameters."""
    torch.manual_seed(dist.get_rank())
    model = nn.Linear(16, 16)
    merger = MERGERS[kind](model)
    for step in range(1, 12):
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter)
        unhealthy = step == 4 and dist.get_rank() == 1
        if unhealthy:
            next(model.parameters()).view(-1)[:] = math.nan
            merger.weight = 0.0
        merger.step()
        if unhealthy:
            for parameter in model.parameters():
                parameter.fill_(1.0)
            merger.start_again()
            merger.weight = 1.0
    merger.finish()
    return all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


@pytest.mark.parametrize("kind", MERGERS)
def test_a_worker_that_starts_again_leaves_its_nan_behind(ranks: Ranks, kind: str) -> None:
    assert ranks.run(2, started_again, kind) == [True, True]


def norm_of_an_unhealthy_worker(unhealthy: int) -> dict[str, Tensor]:
    model = build("norm")
    merger = DiLoCo(model, every=1)
    rank = dist.get_rank()
    state = model.state_dict()
    state["1.running_mean"].fill_(math.nan if rank == unhealthy else rank)
    state["1.running_var"].fill_(math.inf if rank == unhealthy else 2.0 * rank)
    state["1.num_batches_tracked"].fill_(rank + 5)
    merger.weight = float(rank != unhealthy)
    merger.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("unhealthy", [0, 2])
def test_the_buffers_of_a_worker_of_weight_0_reach_nobody(ranks: Ranks, unhealthy: int) -> None:
    mean = {0: 1.5, 2: 0.5}[unhealthy]
    for state in ranks.run(3, norm_of_an_unhealthy_worker, unhealthy):
        assert torch.equal(state["1.running_mean"], torch.full((5,), mean))
        assert torch.equal(state["1.running_var"], torch.full((5,), 2 * mean))
        assert state["1.num_batches_tracked"].item() == {0: 6, 2: 5}[unhealthy]
