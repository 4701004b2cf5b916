"""Any rule of the catalogue across workers: what a merge gives is what the rule gives on the stack of deltas.

The rules are the rows of the property suite, so that a row proves a rule from files, from memory and across workers.

Parameters start at 0 and the outer step adds the merged delta, so that after a merge the anchor is that delta, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

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
from tests.rules.rows import TWELVE, Row, rows

SHAPES = {"embed": (301, 7), "wide": (5, 30_011), "small": (3,), "square": (64, 64), "one": (1,), "last": (129, 33)}
"""Odd sizes; the second one has more than two blocks, and is cut between owners."""

KINDS = {"2 workers": (2, 1), "3 workers": (3, 1), "4 workers": (4, 1), "2 workers of 2 ranks": (2, 2)}
"""Numbers of workers, and of the ranks over which each worker shards its parameters (FSDP2)."""


def rows_for(workers: int, shards: int = 1) -> list[Row]:
    """The rows of the property suite that so many workers can merge by. Workers know no variants of a rule, and none of them
    is a general model; where a worker's ranks cut rows, rules of whole rows are refused."""
    found = [row for row in rows() if not row.variants and row.entry.first != "general" and workers in row.counts]
    return [row for row in found if shards == 1 or not needs_rows(row)]


def needs_rows(row: Row) -> bool:
    """Across members: what a member's rows alone decide, its sender does, where small tensors are gathered."""
    rule = row.build(row.count, shape=SHAPES["wide"])
    return (rule.parts[1] if rule.parts is not None else rule).unit > 1


def row_of(name: str) -> Row:
    """The first row of that name: with parameters at which the rule does something, where it has any."""
    return next(row for row in rows() if row.name == name and not row.variants)


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


class Merged(NamedTuple):
    """What a rank has after a merge.

    Attributes:
        found: what it holds of the merged delta, by tensor: (first element, elements) of each part.
        rule: which rule was taken.
        bytes_sent: for this merge.
    """

    found: Found
    rule: str
    bytes_sent: float


def one_merge(settings: dict[str, Any], weights: list[float], shards: int) -> Merged:
    """One merge of deltas of noise. Worker m has trained on m + 1 tokens, which count where the settings ask for it."""
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
    report = merger.step(tokens=(worker + 1) / shards)
    assert report is not None and merger.anchor is not None
    found: Found = {}
    for part in flat.parts():
        found.setdefault(part.name, []).append((part.first, merger.anchor[part.offset : part.offset + part.numel].clone()))
    return Merged(found, report.rule, report.bytes_sent)


def merges_by_row(workers: int, shards: int) -> dict[str, Merged]:
    """All rows' merges in one process group, one after the other."""
    merges = ((str(row), {"rule": row.name, **row.given}) for row in rows_for(workers, shards))
    return {name: one_merge(settings, [1.0] * workers, shards) for name, settings in merges}


Merges = Callable[[int, int], list[dict[str, Merged]]]


@pytest.fixture(scope="module")
def merges(ranks: Ranks) -> Merges:
    """``merges(workers, shards)``: every rank's merges by the rows' names, made once."""
    return cache(lambda workers, shards: ranks.run(workers * shards, merges_by_row, workers, shards))


def rule_for(name: str, row: Row, weights: list[float]) -> Rule:
    """The row's rule of one tensor, as it is built for rows of a stack."""
    mean = sum(weights) / len(weights)
    given, shared = catalogue.spread(row.name, len(weights), row.given)
    each = tuple(own | {"weight": weight / mean} for own, weight in zip(given, weights, strict=True))
    return catalogue.build(row.name, Target(name, SHAPES[name], each, shared, embedding=name == "embed"))


def on_the_stack(row: Row, weights: list[float]) -> dict[str, Tensor]:
    """The same in one process: the rule on every tensor's deltas, of the members that count."""
    if row.entry.by_tokens:  # tokens^2 / steps, of one step
        weights = [weight * (worker + 1) ** 2 for worker, weight in enumerate(weights)]
    alive = [worker for worker, weight in enumerate(weights) if weight > 0]
    kept = [weights[worker] for worker in alive]
    return {
        name: run(rule_for(name, row, kept), [noise(worker, name) for worker in alive], block=CUT).flatten() for name in SHAPES
    }


def check(results: list[Merged], row: Row, weights: list[float], tolerance: float = 1e-6) -> None:
    """Equal to the bit; to ``tolerance`` of a tensor's largest element where the rule's tallies are sums of floats, or where
    an all-reduce adds the deltas."""
    wanted = on_the_stack(row, weights)
    travels_as_sum = row.name in ("mean", "tokens") and not row.given
    exact = not travels_as_sum and all(rule_for(name, row, weights).exact for name in SHAPES)
    for found, taken, _ in results:
        assert taken == ("mean" if row.entry.by_tokens else catalogue.canonical(row.name))
        for name, parts in found.items():
            for first, values in parts:
                part = wanted[name][first : first + values.numel()]
                error = (values - part).abs().max() if values.numel() else values.new_zeros(())
                assert torch.equal(values, part) if exact else error <= tolerance * wanted[name].abs().max(), (name, error)


def test_the_rules_that_must_agree_are_all_among_the_rows() -> None:
    for workers, shards in KINDS.values():
        assert TWELVE - {row.name for row in rows_for(workers, shards)} == ({"slerp"} if workers > 2 else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", rows(), ids=str)
def test_workers_give_what_the_rule_gives_on_the_stack(merges: Merges, row: Row, kind: str) -> None:
    workers, shards = KINDS[kind]
    if row not in rows_for(workers, shards):
        return
    # Blocks that shards cut elsewhere give slerp's float32 norms and products other roundings: up to 1.2e-6 was seen.
    tolerance = 2e-6 if shards > 1 and "slerp" in row.name else 1e-6
    check([merged[str(row)] for merged in merges(workers, shards)], row, [1.0] * workers, tolerance)


def refusals(workers: int, shards: int) -> dict[str, str]:
    found = {}
    for row in rows_for(workers):
        if needs_rows(row):
            try:
                one_merge({"rule": row.name, **row.given}, [1.0] * workers, shards)
            except dm.UserError as error:
                found[str(row)] = str(error)
    return found


def test_rules_of_whole_rows_are_refused_on_all_ranks_where_shards_cut_rows(ranks: Ranks) -> None:
    names = {str(row) for row in rows_for(2) if needs_rows(row)}
    assert names >= {"model-stock-filter_wise=True", "nuslerp-nuslerp_flatten=False"}
    for said in ranks.run(4, refusals, 2, 2):
        assert said.keys() == names
        assert all("the rule needs whole rows" in reason for reason in said.values())


@pytest.mark.parametrize("rule", ["radial", "median", "ties", "sce", "model-stock", "tokens"])
def test_a_worker_of_no_weight_is_left_out(ranks: Ranks, rule: str) -> None:
    weights, row = [1.0, 0.0, 2.0], row_of(rule)
    check(ranks.run(3, one_merge, {"rule": rule, **row.given}, weights, 1), row, weights)


@pytest.mark.parametrize("workers", [3, 4])
def test_slerp_refuses_more_than_two_workers_by_its_name(ranks: Ranks, workers: int) -> None:
    with pytest.raises(dm.UserError, match=f"rule = 'slerp' takes exactly 2 members, but there are {workers} workers"):
        ranks.run(workers, one_merge, {"rule": "slerp", "t": 0.3}, [1.0] * workers, 1)


def test_where_one_member_is_left_the_mean_is_taken_and_said(ranks: Ranks) -> None:
    for found, rule, _ in ranks.run(2, one_merge, {"rule": "median"}, [1.0, 0.0], 1):
        assert rule == "mean"
        for name, parts in found.items():
            assert torch.equal(parts[0][1], noise(0, name).flatten())


def correlation_decides(above: float) -> str:
    return one_merge({"rule": "auto", "auto_rule": "ties", "auto_above": above, "density": 0.3}, [1.0, 1.0], 1).rule


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
    return one_merge(settings, [1.0] * dist.get_world_size(), 1).bytes_sent


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("rule", ["ties", "median", "dare", "radial"])
def test_a_rule_sends_what_a_mean_sends(ranks: Ranks, rule: str, world: int) -> None:
    plain = sum(ranks.run(world, bytes_of, {"rule": "mean"}))
    sent = sum(ranks.run(world, bytes_of, {"rule": rule, **row_of(rule).given}))
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
