"""Streaming DiLoCo, wires, a sharded outer optimizer and rules, on real ranks, by their identities."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmerge as dm
from distmerge.config.mergers import DiLoCoSettings
from distmerge.config.toml import checked
from distmerge.rules.mean import token_weight
from distmerge.theta.flat import fingerprint
from tests.ranks import Ranks
from tests.spy import counted

STEPS = 13
AVERAGE = {"outer_lr": 1.0, "outer_momentum": 0.0}
SIZES = ["blocks", "one", "wide"]


class Blocks(nn.Module):
    """Four blocks of odd and unequal sizes between an embedding and a head: 1,100 parameters or so."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 9)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(9, 9 + i), nn.Tanh(), nn.Linear(9 + i, 9)) for i in range(4))
        self.head = nn.Linear(9, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


def build(kind: str) -> nn.Module:
    torch.manual_seed(7)
    return {"blocks": Blocks, "one": lambda: nn.Linear(1, 1, bias=False), "wide": lambda: nn.Linear(300, 301)}[kind]()


def train(model: nn.Module, mergers: list[Any], steps: int, first: int = 0, optimizer: Any = None) -> list[Any]:
    """Inner steps on data of each worker's own; the reports of all merges."""
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    width, reports = next(model.parameters()).shape[1], []
    for step in range(first, first + steps):
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(1000 * dist.get_rank() + step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        reports += [report for merger in mergers if (report := merger.step())]
    return reports


def run(kind: str, settings: dict[str, Any], steps: int = STEPS, finish: bool = True) -> tuple[Tensor, list[Any]]:
    model = build(kind)
    merger = dm.DiLoCo(model, **settings)
    reports = train(model, [merger], steps)
    if finish:
        merger.finish()
    return merger.flat.vector.clone(), reports


def compare(one: dict[str, Any], other: dict[str, Any], finish: bool) -> float:
    """The largest relative difference over models of several sizes."""
    pairs = [(run(kind, one, finish=finish)[0], run(kind, other, finish=finish)[0]) for kind in SIZES]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize(
    ("one", "other", "tolerance"),
    [
        # mix 1 is no communication: nothing of the others comes in
        ({"mix": 1.0}, {"every": 1000}, 0.0),
        # averaging through an anchor == averaging the parameters
        (AVERAGE | {"mix": 1e-12}, AVERAGE, 1e-6),
        # a sharded outer step == a replicated one
        ({"outer_sharded": True}, {}, 1e-6),
        ({"outer_sharded": True, "bucket_bytes": 4 * 7777}, {"bucket_bytes": 4 * 5000}, 1e-6),
        # buckets change nothing but the messages
        ({"bucket_bytes": 4 * 9973}, {}, 1e-6),
        # equal weights == no weights
        ({"rule": "tokens"}, {}, 1e-6),
    ],
)  # fmt: skip
def test_identity(ranks: Ranks, world: int, one: dict, other: dict, tolerance: float) -> None:
    one, other = {"every": 5} | one, {"every": 5} | other
    for difference in ranks.run(world, compare, one, other, one.get("mix") != 1.0):
        assert difference <= tolerance


EVERYWHERE: list[dict[str, Any]] = [
    {"fragments": 1},
    {"fragments": 3},
    {"fragments": 4, "fragment_order": "balanced"},
    {"fragments": 2, "overlap": 1, "mix": 0.5},
    {"fragments": 2, "overlap": 2, "mix": 0.25, "wire": "int4", "error_feedback": True},
    {"wire": "bf16"},
    {"wire": "int8", "error_feedback": True, "bucket_bytes": 4 * 100},
    {"wire": "int4"},
    {"outer_sharded": True, "fragments": 2, "overlap": 1},
    {"outer_device": "cpu"},
    {"rule": "radial"},
    {"outer_lr": 1.0, "outer_momentum": 0.0},
    {"nesterov": False, "outer_momentum": 0.5},
]


def same_bits(settings: dict[str, Any]) -> tuple[int, bool]:
    vector, _ = run("blocks", {"every": 6} | settings)
    return int(fingerprint(vector)), bool(vector.isfinite().all())


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("settings", EVERYWHERE, ids=str)
def test_all_workers_end_with_the_same_bits(ranks: Ranks, world: int, settings: dict) -> None:
    results = ranks.run(world, same_bits, settings)
    assert len(set(results)) == 1 and results[0][1]


def ledger_of(settings: dict[str, Any]) -> tuple[float, int, float, int]:
    model = build("blocks")
    merger = dm.DiLoCo(model, every=6, **settings)
    with counted() as traffic:
        train(model, [merger], STEPS)
        merger.finish()
    return merger.bytes_sent, merger.workers.ledger.collectives, traffic.bytes_sent, traffic.collectives


@pytest.mark.parametrize("settings", EVERYWHERE, ids=str)
def test_the_ledger_is_what_was_sent(ranks: Ranks, settings: dict) -> None:
    for sent, collectives, really_sent, really in ranks.run(3, ledger_of, settings):
        assert sent == pytest.approx(really_sent, rel=1e-12)
        assert collectives == really


def resumed(settings: dict[str, Any], stop: int) -> tuple[bool, int]:
    """Stop after ``stop`` steps, carry the state into new objects, go on; against a run without a stop."""
    torch.manual_seed(0)
    through, _ = run("blocks", {"every": 6} | settings, steps=20)
    model = build("blocks")
    merger = dm.DiLoCo(model, every=6, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, [merger], stop, optimizer=optimizer)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), merger.state_dict()))
    again = build("blocks")
    merger = dm.DiLoCo(again, every=6, **settings)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    merger.load_state_dict(state[2])
    train(again, [merger], 20 - stop, first=stop, optimizer=optimizer)
    merger.finish()
    return torch.equal(merger.flat.vector, through), merger.round


@pytest.mark.parametrize("stop", [3, 4, 5, 7])
@pytest.mark.parametrize("settings", [*EVERYWHERE, {"fragments": 2, "overlap": 2, "wire": "int8"}], ids=str)
def test_resume_is_bitwise_even_with_a_fragment_in_flight(ranks: Ranks, settings: dict, stop: int) -> None:
    results = ranks.run(2, resumed, settings, stop)
    assert all(equal for equal, _ in results) and len({rounds for _, rounds in results}) == 1


def paper_box(every: int, overlap: int, mix: float, fragments: int) -> tuple[float, list[int]]:
    """Streaming DiLoCo as its paper's box says, step by step on whole tensors, against the class."""
    model, reference = build("blocks"), build("blocks")
    merger = dm.DiLoCo(model, every=every, overlap=overlap, mix=mix, fragments=fragments, outer_lr=0.4, outer_momentum=0.9)
    reports = train(model, [merger], 20)
    slices = [[part for bucket in fragment for part in bucket.slices] for fragment in merger.fragments]
    vector = dm.flatten(reference).vector
    anchor, velocity = vector.clone(), torch.zeros_like(vector)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    sent: dict[int, tuple[int, Tensor]] = {}
    for step in range(1, 21):
        train(reference, [], 1, first=step - 1, optimizer=optimizer)
        for land in (True, False):
            for number, parts in enumerate(slices):
                if step % every == (number + 1) * every // fragments % every and land == (overlap == 0):
                    sent[number] = (step, (vector - anchor).clone())
                if number in sent and sent[number][0] + overlap == step:
                    delta = sent.pop(number)[1]
                    dist.all_reduce(delta)
                    delta /= dist.get_world_size()
                    for part in parts:
                        velocity[part] = 0.9 * velocity[part] + delta[part]
                        anchor[part] += 0.4 * (delta[part] + 0.9 * velocity[part])
                        vector[part] = mix * vector[part] + (1 - mix) * anchor[part]
    return (merger.flat.vector - vector).abs().max().item(), [report.steps for report in reports]


@pytest.mark.parametrize("case", [(6, 0, 0.0, 1), (6, 2, 0.5, 1), (6, 0, 0.3, 2), (6, 1, 0.5, 3), (10, 2, 0.5, 4)])
def test_streaming_is_the_papers_box(ranks: Ranks, case: tuple) -> None:
    for difference, steps in ranks.run(2, paper_box, *case):
        assert difference < 1e-6
        assert steps[-1] == case[0] and len(steps) >= 2


def weighted(weights: list[float]) -> tuple[Tensor, Tensor]:
    """One merge with weights; worker 1 has NaN parameters where its weight is 0."""
    model = build("blocks")
    merger = dm.DiLoCo(model, every=100, outer_lr=1.0, outer_momentum=0.0, wire="fp32", outer_device="cpu", mix=0.0)
    vector = merger.flat.vector
    vector += torch.randn(vector.numel(), generator=torch.Generator().manual_seed(dist.get_rank()))
    own = vector.clone()
    merger.weight = weights[dist.get_rank()]
    if merger.weight == 0:
        vector.fill_(torch.nan)
    merger.step()
    merger.finish()
    return own, vector.clone()


def test_a_worker_of_no_weight_takes_part_and_starts_again_from_the_others(ranks: Ranks) -> None:
    weights = [3.0, 0.0, 1.0]
    results = ranks.run(3, weighted, weights)
    expected = (3 * results[0][0] + results[2][0]) / 4
    for _, merged in results:
        torch.testing.assert_close(merged, expected, rtol=0, atol=1e-6)


def by_tokens() -> Tensor:
    model = build("blocks")
    merger = dm.DiLoCo(model, every=2, outer_lr=1.0, outer_momentum=0.0, rule="tokens")
    rank = dist.get_rank()
    start = merger.flat.vector.clone()
    merger.flat.vector.add_(1.0 if rank else -1.0)
    merger.step(tokens=10.0 + 20 * rank)
    merger.step(tokens=10.0 + 20 * rank)
    return merger.flat.vector - start


def test_token_weights(ranks: Ranks) -> None:
    small, large = token_weight(20, 2), token_weight(60, 2)
    for moved in ranks.run(2, by_tokens):
        torch.testing.assert_close(moved, torch.full_like(moved, (large - small) / (large + small)), rtol=0, atol=1e-6)


def spread_of(settings: dict[str, Any]) -> tuple[Tensor, float | None, float | None]:
    model = build("blocks")
    merger = dm.DiLoCo(model, every=4, **settings)
    train(model, [merger], 3)
    merger.progress.count(1.0)
    before = merger.flat.vector.clone()
    report = merger.merge(0)
    return before, report.divergence, report.correlation


@pytest.mark.parametrize("settings", [{}, {"outer_lr": 1.0, "outer_momentum": 0.0}, {"outer_sharded": True}], ids=str)
def test_divergence_and_correlation(ranks: Ranks, settings: dict) -> None:
    results = ranks.run(3, spread_of, settings)
    start = dm.flatten(build("blocks")).vector.double()
    deltas = torch.stack([theta.double() - start for theta, _, _ in results])
    divergence = (deltas - deltas.mean(0)).square().sum(1).mean().item()
    spread = deltas.square().sum(1).mean().item()
    correlation = (3 * deltas.mean(0).square().sum().item() / spread - 1) / 2
    for _, measured, correlated in results:
        assert measured == pytest.approx(divergence, rel=1e-5)
        assert correlated is None if settings else correlated == pytest.approx(correlation, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap": 5, "fragments": 2, "every": 10}, "overlap must be < every / fragments = 5, got 5"),
        ({"fragments": 11, "every": 10}, "fragments must be <= every = 10, got 11"),
        ({"wire": "fp8"}, "wire must be 'fp32', 'bf16', 'int8' or 'int4', got 'fp8'"),
        (
            {"outer_sharded": True, "wire": "int8"},
            "wire must be fp32 with outer_sharded, which sends parameters instead of deltas, got int8",
        ),
        (
            {"rule": "radial", "outer_sharded": True},
            'outer_sharded must be false for rule "radial", which is not linear, got true',
        ),
        ({"outer_momentum": 1.0}, "outer_momentum must be < 1, got 1.0"),
        ({"mix": 1.5}, "mix must be <= 1, got 1.5"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(dm.UserError) as error:
        checked(DiLoCoSettings, **settings)
    assert str(error.value) == message


def too_many_fragments() -> str:
    try:
        dm.DiLoCo(build("blocks"), every=10, fragments=5)
    except dm.UserError as error:
        return str(error)
    return ""


def test_more_fragments_than_blocks_are_refused(ranks: Ranks) -> None:
    assert ranks.run(2, too_many_fragments) == ["fragments must be <= the model's 4 blocks, got 5"] * 2
