"""What mergers ask of a model and of its ranks: buffers by policy, equal models, workers of several ranks."""

from __future__ import annotations

import contextlib
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmerge as dm
from distmerge.config import train as config
from distmerge.theta.flat import fingerprint
from tests.ranks import Ranks
from tests.spy import counted
from tests.workers.loops import STEPS, build, inner, run_diloco, train, vector_of

# ---- buffers


class WithBuffer(nn.Module):
    def __init__(self, name: str, value: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer(name, value)


def merged_norm() -> dict[str, Tensor]:
    model = build("norm")
    merger = dm.DiLoCo(model, every=1)
    rank = float(dist.get_rank())
    state = model.state_dict()
    state["1.running_mean"].fill_(rank)
    state["1.running_var"].fill_(2 * rank)
    state["1.num_batches_tracked"].fill_(int(rank) + 5)
    merger.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_batch_norm_is_averaged_and_its_counter_is_the_first_workers(ranks: Ranks) -> None:
    for state in ranks.run(3, merged_norm):
        assert torch.equal(state["1.running_mean"], torch.full((5,), 1.0))
        assert torch.equal(state["1.running_var"], torch.full((5,), 2.0))
        assert state["1.num_batches_tracked"].item() == 5


def with_buffer(name: str, policies: dict[str, Any] | None, dtype: str, differ: bool) -> tuple[str, list[float]]:
    """What the merger said, and what the buffer holds after a round and its end."""
    model = WithBuffer(name, torch.zeros(3, dtype=getattr(torch, dtype)))
    try:
        merger = dm.DiLoCo(model, every=5, buffers=policies)
        if differ:
            getattr(model, name).fill_(dist.get_rank() + 1)
        merger.step()
        merger.finish()
    except dm.UserError as error:
        return str(error), getattr(model, name).float().tolist()
    return "", getattr(model, name).float().tolist()


@pytest.mark.parametrize(
    ("policy", "dtype", "outcome"),
    [
        ("mean", "float32", [1.5] * 3),
        ("mean", "bfloat16", [1.5] * 3),
        ("last", "int64", [1.0] * 3),
        ("last", "bool", [1.0] * 3),
        ("last", "float64", [1.0] * 3),
    ],
)
def test_given_policies(ranks: Ranks, policy: str, dtype: str, outcome: list[float]) -> None:
    assert ranks.run(2, with_buffer, "statistic", {"statistic": policy}, dtype, True) == [("", outcome)] * 2


def test_an_unknown_buffer_is_refused_by_name(ranks: Ranks) -> None:
    expected = "buffer statistic has no merge policy; pass buffers={'statistic': 'mean' | 'last' | 'equal'}"
    assert ranks.run(2, with_buffer, "statistic", None, "float32", False) == [(expected, [0.0] * 3)] * 2


def test_buffers_that_must_be_equal_and_are_not(ranks: Ranks) -> None:
    for message, _ in ranks.run(3, with_buffer, "inv_freq", None, "float32", True):
        assert message == (
            "all workers must agree on the buffers ['inv_freq'], which must be equal: worker 1 differs from worker 0"
        )
    assert ranks.run(2, with_buffer, "inv_freq", None, "float32", False) == [("", [0.0] * 3)] * 2


def equal_buffers_are_counted() -> tuple[tuple[int, float], tuple[int, float]]:
    model = WithBuffer("inv_freq", torch.ones(3))
    merger = dm.DiLoCo(model, every=5)
    with counted() as traffic:
        merger.step()
        merger.finish()
    return (merger.workers.ledger.collectives, merger.bytes_sent), (traffic.collectives, traffic.bytes_sent)


def test_comparing_buffers_is_in_the_ledger(ranks: Ranks) -> None:
    for ledger, traffic in ranks.run(3, equal_buffers_are_counted):
        assert ledger == pytest.approx(traffic)


# ---- models that cannot be merged


def differing(what: str) -> str:
    odd = dist.get_rank() == dist.get_world_size() - 1
    model: nn.Module
    match what:
        case "shape":
            model = nn.Linear(3, 5 if odd else 4)
        case "order":
            model = nn.Linear(6, 1, bias=False) if odd else nn.Linear(3, 2, bias=False)
        case "name":
            model = nn.ModuleDict({"b" if odd else "a": nn.Linear(2, 2)})
        case "frozen":
            model = nn.Linear(3, 3)
            model.bias.requires_grad_(not odd)
        case "buffer":
            model = WithBuffer("position_ids", torch.zeros(4 if odd else 3))
        case "buffer missing":
            model = WithBuffer("position_ids", torch.zeros(3)) if odd else nn.ModuleDict({"layer": nn.Linear(2, 2)})
        case _:
            raise AssertionError(what)
    with pytest.raises(dm.UserError) as caught:
        dm.DiLoCo(model, every=2)
    return str(caught.value)


@pytest.mark.parametrize("what", ["shape", "order", "name", "frozen", "buffer", "buffer missing"])
def test_models_that_differ_are_refused_on_all_ranks(ranks: Ranks, what: str) -> None:
    for message in ranks.run(3, differing, what):
        assert message.startswith("all workers must agree on the names and shapes of the parameters and buffers: ")
        assert message.endswith("worker 2 differs from worker 0")


def test_before_the_process_group() -> None:
    with pytest.raises(dm.UserError, match="init_process_group"):
        dm.DiLoCo(nn.Linear(2, 2), every=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"every": 2.5}, "every must be an integer, got 2.5"),
        ({"every": 5, "outer_lr": 0}, "outer_lr must be > 0, got 0"),
        ({"every": 5, "outer_lr": math.nan}, "outer_lr must be finite, got nan"),
        ({"every": 5, "outer_momentum": 1.0}, "outer_momentum must be < 1, got 1.0"),
        ({"every": 5, "bucket_bytes": 3}, "bucket_bytes must be >= 4, got 3"),
    ],
    ids=str,
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dm.UserError) as caught:
        dm.DiLoCo(nn.Linear(2, 2), **options)
    assert str(caught.value) == message


def moved() -> str:
    model = build("deep")
    merger = dm.DiLoCo(model, every=1)
    model.inner.weight.data = model.inner.weight.data.clone()  # pyright: ignore
    with pytest.raises(dm.UserError) as caught:
        merger.step()
    return str(caught.value)


def test_a_model_moved_after_the_merger_was_made(ranks: Ranks) -> None:
    expected = "parameter inner.weight was moved after the merger was made; make the merger after model.to()"
    assert ranks.run(2, moved) == [expected] * 2


# ---- models of other kinds


def half_precision() -> tuple[str, Tensor, Tensor]:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = build("deep").bfloat16()
    merger = dm.DiLoCo(model, every=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * (rank + 1))
    merger.step()
    assert merger.anchor is not None
    return str(merger.anchor.dtype), merger.anchor.clone(), vector_of(model)


def test_a_bfloat16_model_has_a_float32_anchor(ranks: Ranks) -> None:
    results = ranks.run(2, half_precision)
    for dtype, anchor, theta in results:
        assert dtype == "torch.float32"
        assert theta.dtype == torch.bfloat16
        assert torch.equal(theta, anchor.bfloat16())
        assert torch.equal(theta, results[0][2])


def tied_and_frozen() -> tuple[int, list[bool]]:
    table, frozen, head = nn.Embedding(5, 3), nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 5, bias=False)
    head.weight = table.weight
    merger = dm.DiLoCo(nn.ModuleList([table, frozen, head]), every=1, outer_lr=1.0, outer_momentum=0.0)
    rank = dist.get_rank()
    with torch.no_grad():
        table.weight.fill_(rank)
        frozen.weight.fill_(rank)
    merger.step()
    holds = [head.weight is table.weight, bool((head.weight == 0.5).all()), bool((frozen.weight == rank).all())]
    return merger.flat.vector.numel(), holds


def test_tied_weights_are_merged_once_and_frozen_ones_never(ranks: Ranks) -> None:
    assert ranks.run(2, tied_and_frozen) == [(15, [True] * 3)] * 2


def several_mergers() -> tuple[bool, bool, Tensor]:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = build("deep")
    first, second = dm.DiLoCo(model, every=2, outer_lr=1.0, outer_momentum=0.0), dm.DiLoCo(model, every=4)
    optimizer = inner("sgd", model)
    merged = True
    for step in range(STEPS):
        train(model, optimizer, rank, step)
        reports = [merger.step() for merger in (first, second)]
        merged &= [report is not None for report in reports] == [(step + 1) % 2 == 0, (step + 1) % 4 == 0]
    first.finish()
    second.finish()
    return merged, first.flat.vector.data_ptr() == second.flat.vector.data_ptr(), vector_of(model)


def test_several_mergers_on_one_model(ranks: Ranks) -> None:
    results = ranks.run(2, several_mergers)
    assert all(merged and shared for merged, shared, _ in results)
    assert torch.equal(results[0][2], results[1][2])


# ---- workers of several ranks


def two_by_two(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Two workers of two ranks: a worker's ranks train on the same data, as if their gradients had been reduced."""
    from distmerge.engine.parameters import ReplicatedParameters
    from distmerge.launch.ranks import Place
    from distmerge.mesh import Mesh

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = Mesh(config.MeshSettings(workers=2, timeout_seconds=600), Place(rank, world, rank, world), threads=1)
    torch.manual_seed(mesh.worker)
    model = build(kind)
    merger = dm.DiLoCo(ReplicatedParameters(model, mesh.inside), **options, group=mesh.peers)
    optimizer = inner("adamw", model)
    with counted(mesh.peers) as traffic:
        for step in range(STEPS):
            train(model, optimizer, mesh.worker, step)
            merger.step()
        tail = merger.finish()
    with contextlib.closing(mesh):
        return {
            "theta": vector_of(model),
            "digest": fingerprint(vector_of(model)).item(),
            "tail": tail,
            "share": merger.flat.vector.numel(),
            "traffic": (traffic.collectives, traffic.bytes_sent),
            "ledger": (merger.workers.ledger.collectives, merger.bytes_sent),
        }


@pytest.mark.parametrize("kind", ["one", "deep"])
def test_a_workers_ranks_share_the_traffic(ranks: Ranks, kind: str) -> None:
    options = {"every": 4, "bucket_bytes": 100}
    alone = ranks.run(2, run_diloco, kind, options)
    results = ranks.run(4, two_by_two, kind, options, group=False)
    assert len({result["digest"] for result in results}) == 1
    torch.testing.assert_close(results[0]["theta"], alone[0]["theta"], rtol=0, atol=1e-6)
    numel = results[0]["theta"].numel()
    assert sorted(result["share"] for result in results[:2]) == [numel // 2, numel - numel // 2]
    for result in results:
        assert result["ledger"] == pytest.approx(result["traffic"])
        buckets = math.ceil(4 * result["share"] / 100)
        beside = 3 * (24 + 4 * buckets)  # each merge's three scalars, and each bucket's weight
        assert result["ledger"][1] - beside == pytest.approx(4 * result["share"] * 3)
        assert result["tail"].divergence == pytest.approx(alone[0]["reports"][-1].divergence, rel=1e-4)
    beside = 3 * (24 + 4 * math.ceil(4 * numel / 100))
    assert alone[0]["ledger"][1] - beside == pytest.approx(4 * numel * 3)
