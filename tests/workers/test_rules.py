"""Any rule of the catalogue across workers: what an exchange gives is what the rule gives on the stack of deltas.

Parameters start at 0 and the outer step adds the merged delta, so that after a merge the anchor is that delta, bit for bit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distmerge as dm
from distmerge.rules import catalogue
from distmerge.rules.protocol import Rule, Target, run
from distmerge.workers.shares import CUT, Piece, aligned_shares
from tests.ranks import Ranks

SHAPES = {"embed": (301, 7), "wide": (5, 30_011), "small": (3,), "square": (64, 64), "one": (1,), "last": (129, 33)}
"""Odd sizes; the second one has more than two blocks, and is cut between owners."""

RULES: dict[str, dict[str, Any]] = {
    "mean": {},
    "tokens": {},
    "radial": {},
    "median": {},
    "trimmed-mean": {},
    "ties": {"density": 0.3},
    "dare": {"density": 0.5},
    "della": {"density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"density": 0.6, "gamma": 0.05},
    "sce": {"select_topk": 0.4},
    "model-stock": {},
}
"""The rules, with parameters at which they do something."""


class Zeros(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def noise(worker: int, name: str) -> Tensor:
    """A worker's delta of one tensor: a common part and one of its own, with equal magnitudes and zeros among them."""
    common, own = (torch.Generator().manual_seed(1000 * seed + len(name)) for seed in (7, worker))
    x = torch.randn(SHAPES[name], generator=common) + torch.randn(SHAPES[name], generator=own)
    return (x * 64).round() / 64  # so that magnitudes are equal now and then


Found = dict[str, list[tuple[int, Tensor]]]


def one_merge(settings: dict[str, Any], weights: list[float], shards: int) -> tuple[Found, str, float]:
    """What this rank holds of the merged delta: per tensor, (first element, elements); which rule was taken; the bytes sent."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // shards, shards), mesh_dim_names=("workers", "shards"))
    worker, model = mesh.get_local_rank("workers"), Zeros()
    if shards > 1:
        fully_shard(model, mesh=mesh["shards"])
    merger = dm.DiLoCo(model, every=1, outer_lr=1.0, outer_momentum=0.0, mix=1e-9, group=mesh.get_group("workers"), **settings)
    flat = merger.flat
    for part in flat.parts():
        flat.vector[part.offset : part.offset + part.numel] = noise(worker, part.name).flatten()[
            part.first : part.first + part.numel
        ]
    flat.push()
    merger.weight = weights[worker]
    report = merger.step()
    assert report is not None and merger.anchor is not None
    found: Found = {}
    for part in flat.parts():
        found.setdefault(part.name, []).append((part.first, merger.anchor[part.offset : part.offset + part.numel].clone()))
    return found, report.rule, report.bytes_sent


def rule_for(name: str, rule: str, weights: list[float]) -> Rule:
    mean = sum(weights) / len(weights)
    given, shared = catalogue.spread(rule, len(weights), RULES[rule])
    each = tuple(own | {"weight": weight / mean} for own, weight in zip(given, weights, strict=True))
    target = Target(name, SHAPES[name], each, shared, embedding=name == "embed")
    return catalogue.build(rule, target)


def on_the_stack(rule: str, weights: list[float]) -> dict[str, Tensor]:
    """The same in one process: the rule on every tensor's deltas, of the members that count."""
    alive = [worker for worker, weight in enumerate(weights) if weight > 0]
    kept = [weights[worker] for worker in alive]
    return {
        name: run(rule_for(name, rule, kept), [noise(worker, name) for worker in alive], block=CUT).flatten() for name in SHAPES
    }


def check(results: list, rule: str, weights: list[float]) -> None:
    wanted = on_the_stack(rule, weights)
    exact = all(rule_for(name, rule, weights).exact for name in SHAPES) and rule not in ("mean", "tokens")
    for found, taken, _ in results:
        assert taken == catalogue.canonical(rule)
        for name, parts in found.items():
            for first, values in parts:
                part = wanted[name][first : first + values.numel()]
                assert torch.equal(values, part) if exact else torch.allclose(values, part, rtol=1e-6, atol=1e-6), (
                    name,
                    (values - part).abs().max(),
                )


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("mean", "tokens")])
def test_an_exchange_gives_what_the_rule_gives_on_the_stack(ranks: Ranks, rule: str, world: int) -> None:
    check(ranks.run(world, one_merge, {"rule": rule, **RULES[rule]}, [1.0] * world, 1), rule, [1.0] * world)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("mean", "tokens")])
def test_the_same_where_the_ranks_of_a_worker_hold_shards(ranks: Ranks, rule: str) -> None:
    check(ranks.run(4, one_merge, {"rule": rule, **RULES[rule]}, [1.0, 1.0], 2), rule, [1.0, 1.0])


@pytest.mark.parametrize("rule", ["radial", "median", "ties", "sce", "model-stock"])
def test_a_worker_of_no_weight_is_left_out(ranks: Ranks, rule: str) -> None:
    weights = [1.0, 0.0, 2.0]
    check(ranks.run(3, one_merge, {"rule": rule, **RULES[rule]}, weights, 1), rule, weights)


def test_slerp_joins_two_workers(ranks: Ranks) -> None:
    results = ranks.run(2, one_merge, {"rule": "slerp", "t": 0.3}, [1.0, 1.0], 1)
    for name in SHAPES:
        target = Target(name, SHAPES[name], ({"weight": 1.0}, {"weight": 1.0}), {"t": 0.3})
        wanted = run(catalogue.build("slerp", target), [noise(worker, name) for worker in range(2)], block=CUT)
        for found, _, _ in results:
            assert torch.allclose(found[name][0][1], wanted.flatten(), rtol=1e-6, atol=1e-6)


def test_where_one_member_is_left_the_mean_is_taken_and_said(ranks: Ranks) -> None:
    for found, rule, _ in ranks.run(2, one_merge, {"rule": "median"}, [1.0, 0.0], 1):
        assert rule == "mean"
        for name, parts in found.items():
            assert torch.equal(parts[0][1], noise(0, name).flatten())


def correlation_decides(above: float) -> str:
    return one_merge({"rule": "auto", "auto_rule": "ties", "auto_above": above, "density": 0.3}, [1.0, 1.0], 1)[1]


def test_auto_takes_the_mean_of_deltas_that_are_alike(ranks: Ranks) -> None:
    """The common part and the own ones are of one size: the correlation is about one half."""
    assert ranks.run(2, correlation_decides, 0.4) == ["mean"] * 2
    assert ranks.run(2, correlation_decides, 0.6) == ["ties"] * 2


def test_a_sum_is_asked_for_by_a_parameter_of_the_mean(ranks: Ranks) -> None:
    for found, rule, _ in ranks.run(2, one_merge, {"rule": "mean", "normalize": False}, [1.0, 1.0], 1):
        assert rule == "mean"
        for name, parts in found.items():
            assert torch.equal(parts[0][1], (noise(0, name) + noise(1, name)).flatten())


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "median"},
        {"rule": "ties", "density": 0.3},
        {"rule": "radial"},
        {"rule": "median", "wire": "bf16"},
        {"rule": "median", "wire": "int8"},
        {"rule": "ties", "density": 0.3, "wire": "int4", "error_feedback": True},
    ],
)
@pytest.mark.parametrize("nonfinite", ["raise", "leave-out"])
def test_an_unhealthy_worker_is_refused_or_left_out(ranks: Ranks, settings: dict[str, Any], nonfinite: str) -> None:
    answers = ranks.run(3, unhealthy_merge, settings | {"nonfinite": nonfinite})
    if nonfinite == "raise":
        assert all("not finite" in answer for answer in answers)
    else:
        assert all(answer == "finite" for answer in answers)


def unhealthy_merge(settings: dict[str, Any]) -> str:
    """Of three workers the last one holds a NaN, which a median or a trim would hide."""
    merger = dm.DiLoCo(Zeros(), every=1, outer_lr=1.0, outer_momentum=0.0, **settings)
    merger.flat.vector.normal_()
    if dist.get_rank() == 2:
        merger.flat.vector[17] = torch.nan
    try:
        merger.step()
    except dm.UserError as error:
        return str(error)
    return "finite" if bool(torch.isfinite(merger.flat.vector).all()) else "NaN"


def bytes_of(settings: dict[str, Any]) -> float:
    return one_merge(settings, [1.0] * dist.get_world_size(), 1)[2]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("rule", ["ties", "median", "dare", "radial"])
def test_a_rule_sends_what_a_mean_sends(ranks: Ranks, rule: str, world: int) -> None:
    plain = sum(ranks.run(world, bytes_of, {"rule": "mean"}))
    sent = sum(ranks.run(world, bytes_of, {"rule": rule, **RULES[rule]}))
    assert sent <= 1.02 * plain + 4096 * world * world  # what a model of so few parameters adds to its tallies


def test_shares_end_with_tensors_where_they_can() -> None:
    pieces = [Piece("a", 0, 0, 100_000), Piece("b", 0, 100_000, 200_050), Piece("c", 0, 200_050, 400_000)]
    shares = aligned_shares(pieces, 400_000, 2, lambda name: 1)
    assert shares.bounds == ((0, 200_050), (200_050, 400_000))
    assert all(row % 64 == 0 for row in shares.rows)


def test_shares_end_with_rows_where_they_must() -> None:
    pieces = [Piece("a", 0, 0, 1_000_000)]
    shares = aligned_shares(pieces, 1_000_000, 4, lambda name: 1000)
    assert all(stop % 1000 == 0 for _, stop in shares.bounds)
    assert max(stop - start for start, stop in shares.bounds) <= 250_000 + CUT
