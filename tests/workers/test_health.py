"""What is not finite: refused by all workers, or left out, and never merged in silence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distmerge as dm
from distmerge.workers.divergence import Divergence
from distmerge.workers.group import WorkerGroup
from tests.ranks import Ranks
from tests.workers.test_streaming import build

SETTINGS: list[dict[str, Any]] = [
    {},
    {"outer_lr": 1.0, "outer_momentum": 0.0},
    {"wire": "int4"},
    {"outer_sharded": True},
    {"mix": 0.5},
    {"overlap": 1},
    {"rule": "radial"},
]


def one_unhealthy(kind: str, settings: dict[str, Any], value: float) -> tuple[str, Tensor, Tensor, Any]:
    """A round in which worker 1 holds a value that is not finite; what was said, its own parameters, what they became."""
    model = build("blocks")
    merger: Any = dm.DiLoCo(model, every=2, **settings) if kind == "diloco" else dm.SPARTA(model, fraction=1.0, **settings)
    vector, rank = merger.flat.vector, dist.get_rank()
    vector += torch.randn(vector.numel(), generator=torch.Generator().manual_seed(rank))
    own = vector.clone()
    if rank == 1:
        vector[3] = value
    said, reports = "", []
    try:
        reports = [merger.step() for _ in range(3)]
    except dm.UserError as error:
        said = str(error)
    return said, own, vector.clone(), next((report.left_out for report in reports if report is not None), None)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_all_workers_refuse_a_mean_that_is_not_finite(ranks: Ranks, settings: dict, value: float) -> None:
    for said, _, _, _ in ranks.run(2, one_unhealthy, "diloco", settings, value):
        assert said.startswith("the merge at step ") and "values that are not finite" in said and "\n" not in said


@pytest.mark.parametrize("settings", [{}, {"wire": "int8"}, {"delay": 1}], ids=str)
def test_all_workers_refuse_a_sparse_mean_that_is_not_finite(ranks: Ranks, settings: dict) -> None:
    for said, _, _, _ in ranks.run(2, one_unhealthy, "sparta", settings, math.nan):
        assert said.startswith("the merge at step ")


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_an_unhealthy_worker_is_left_out_and_takes_the_others_values(ranks: Ranks, settings: dict) -> None:
    results = ranks.run(3, one_unhealthy, "diloco", settings | {"nonfinite": "leave-out"}, math.nan)
    for said, _, vector, _ in results:
        assert said == "" and bool(vector.isfinite().all())
    assert [left_out for _, _, _, left_out in results] == [False, True, False]
    if settings == SETTINGS[1]:
        mean = (results[0][1] + results[2][1]) / 2
        for _, _, vector, _ in results:
            torch.testing.assert_close(vector, mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"delay": 1}, {"ema": 0.5, "delay": 1}], ids=str)
def test_an_unhealthy_worker_is_left_out_of_sparse_rounds(ranks: Ranks, settings: dict) -> None:
    for said, _, vector, _ in ranks.run(3, one_unhealthy, "sparta", settings | {"nonfinite": "leave-out"}, math.nan):
        assert said == "" and bool(vector.isfinite().all())


def divergence_of_nan() -> float:
    flat, workers = dm.flatten(build("blocks")), WorkerGroup()
    measured = Divergence(flat.vector.device)
    measured.add_own(torch.tensor([1.0, math.nan if dist.get_rank() else 2.0]))
    measured.add_merged(torch.tensor([1.0]))
    return measured.finish(workers, flat, 1.0, anchored=True)[0]


def test_the_divergence_of_an_unhealthy_worker_is_nan(ranks: Ranks) -> None:
    """max(0.0, nan) is 0.0, which says that the workers are healthy."""
    assert all(math.isnan(divergence) for divergence in ranks.run(2, divergence_of_nan))


def changed(kind: str) -> str:
    """What a merge says after the model trains other parameters than the merger knows."""
    model = build("blocks")
    merger: Any = dm.DiLoCo(model, every=1) if kind == "diloco" else dm.SPARTA(model)
    merger.step()
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    try:
        merger.step()
    except dm.UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("kind", ["diloco", "sparta"])
def test_a_merge_names_parameters_that_were_replaced(ranks: Ranks, kind: str) -> None:
    for said in ranks.run(2, changed, kind):
        assert said.startswith("parameter embed.weight is not the one that the merger was made with")


def sharded_and_frozen() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("worker", "shard"))
    model = build("blocks")
    fully_shard(model, mesh=mesh["shard"])
    merger = dm.DiLoCo(model, every=1, group=mesh.get_group("worker"))
    model(torch.ones(2, 5)).sum().backward()
    merger.step()
    model.head.requires_grad_(False)  # pyright: ignore[reportCallIssue]
    try:
        merger.step()
    except dm.UserError as error:
        return str(error)
    return ""


def test_a_sharded_model_too(ranks: Ranks) -> None:
    for said in ranks.run(2, sharded_and_frozen):
        assert said == "parameter head.weight was frozen after the merger was made: make a new merger"
