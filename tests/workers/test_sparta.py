"""SPARTA on real ranks, and the selectors' permutations."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distmerge as dm
from distmerge.theta.flat import fingerprint
from distmerge.workers.selection import permute, select
from tests.ranks import Ranks
from tests.spy import counted
from tests.workers.test_streaming import build, train


@pytest.mark.parametrize("numel", [1, 2, 3, 7, 64, 1000, 4099])
def test_a_permutation_is_one(numel: int) -> None:
    for key in range(3):
        values = permute(torch.arange(numel), numel, seed=5, key=key)
        assert torch.equal(values.sort().values, torch.arange(numel))
        assert torch.equal(values[-1:], permute(torch.tensor([numel - 1]), numel, seed=5, key=key))
    if numel > 100:
        assert not torch.equal(permute(torch.arange(numel), numel, 5, 0), permute(torch.arange(numel), numel, 5, 1))
        assert not torch.equal(permute(torch.arange(numel), numel, 5, 0), permute(torch.arange(numel), numel, 6, 0))


def test_a_permutation_looks_random() -> None:
    numel = 100_003
    values = permute(torch.arange(numel), numel, seed=0, key=0).double()
    position = torch.arange(numel).double()
    correlation = torch.corrcoef(torch.stack([values, position]))[0, 1].item()
    neighbours = torch.corrcoef(torch.stack([values[1:], values[:-1]]))[0, 1].item()
    assert abs(correlation) < 0.02 and abs(neighbours) < 0.02
    counts = torch.histc(values[: numel // 10], bins=50, min=0, max=numel)
    assert ((counts - counts.mean()).square().sum() / counts.mean()).item() < 95  # chi-square with 49 degrees, p = 1e-4


@pytest.mark.parametrize(("numel", "fraction"), [(1000, 0.1), (1003, 0.07), (7, 0.3), (1, 0.5), (10, 1.0), (5000, 0.005)])
def test_coverage(numel: int, fraction: float) -> None:
    rounds = math.ceil(numel / max(1, math.floor(fraction * numel + 0.5)))
    for selector in ("shuffled", "partitioned"):
        for cycle in range(2):
            chosen = torch.cat([select(selector, numel, fraction, cycle * rounds + r, seed=3) for r in range(rounds)])
            assert torch.equal(chosen.sort().values, torch.arange(numel))
    first = select("shuffled", numel, fraction, 0, seed=3)
    assert torch.equal(first, select("shuffled", numel, fraction, rounds, seed=3))
    for r in range(5):
        drawn = select("random", numel, fraction, r, seed=3)
        assert len(drawn.unique()) == len(drawn) == len(first)


def test_random_covers_as_independent_draws_do() -> None:
    numel, fraction, rounds = 20_000, 0.05, 30
    seen = torch.zeros(numel, dtype=torch.bool)
    for r in range(rounds):
        seen[select("random", numel, fraction, r, seed=1)] = True
    assert seen.float().mean().item() == pytest.approx(1 - (1 - fraction) ** rounds, abs=0.01)


def whole_is_average(selector: Any) -> tuple[Tensor, Tensor]:
    """p = 1 is averaging."""
    vectors = []
    for make in (
        lambda model: dm.SPARTA(model, fraction=1.0, every=3, selector=selector),
        lambda model: dm.DiLoCo(model, every=3, outer_lr=1.0, outer_momentum=0.0),
    ):
        model = build("blocks")
        merger = make(model)
        train(model, [merger], 9)
        vectors.append(merger.flat.vector.clone())
    return vectors[0], vectors[1]


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("selector", ["random", "shuffled", "partitioned"])
def test_the_whole_as_a_fraction_is_averaging(ranks: Ranks, world: int, selector: str) -> None:
    for sparse, averaged in ranks.run(world, whole_is_average, selector):
        torch.testing.assert_close(sparse, averaged, rtol=1e-6, atol=1e-7)


def one_round(fraction: float, wire: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    model = build("blocks")
    merger = dm.SPARTA(model, fraction=fraction, wire=wire)
    vector = merger.flat.vector
    vector += torch.randn(vector.numel(), generator=torch.Generator().manual_seed(dist.get_rank()))
    before = vector.clone()
    with counted() as traffic:
        merger.step()
    return before, vector.clone(), merger.indices(0), (traffic.collectives, traffic.bytes_sent, merger.bytes_sent)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_round_averages_its_indices_and_nothing_else(ranks: Ranks, world: int) -> None:
    results = ranks.run(world, one_round, 0.05, "fp32")
    mean = torch.stack([before for before, *_ in results]).mean(0)
    for before, after, indices, (collectives, really_sent, sent) in results:
        assert torch.equal(indices, results[0][2])
        expected = before.clone()
        expected[indices] = mean[indices]
        torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
        untouched = torch.ones_like(after, dtype=torch.bool)
        untouched[indices] = False
        assert torch.equal(after[untouched], before[untouched])
        assert collectives == 1 and sent == really_sent == 2 * (world - 1) / world * 4 * (len(indices) + 1)


@pytest.mark.parametrize(("wire", "tolerance"), [("bf16", 2e-2), ("int8", 4e-2), ("int4", 0.6)])
def test_a_thin_wire_is_near_and_equal_on_all(ranks: Ranks, wire: str, tolerance: float) -> None:
    results = ranks.run(3, one_round, 0.3, wire)
    indices = results[0][2]
    mean = torch.stack([before for before, *_ in results]).mean(0)[indices]
    for _, after, _, _ in results:
        assert torch.equal(after[indices], results[0][1][indices])
        torch.testing.assert_close(after[indices], mean, rtol=0, atol=tolerance)


def delayed(delay: int, ema: float) -> tuple[Tensor, Tensor]:
    """The class against the formula: theta[I] += smoothed(mean(t - d) - own(t - d))."""
    model, reference = build("blocks"), build("blocks")
    merger = dm.SPARTA(model, fraction=0.2, every=2, delay=delay, ema=ema)
    train(model, [merger], 11)
    vector = dm.flatten(reference).vector
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    smoothed, sent = torch.zeros_like(vector), []
    for step in range(1, 12):
        train(reference, [], 1, first=step - 1, optimizer=optimizer)
        if step % 2 == 0:
            indices = merger.indices(len(sent))
            own = vector[indices].clone()
            mean = own.clone()
            dist.all_reduce(mean)
            sent.append((step, indices, mean / dist.get_world_size() - own))
        for when, indices, difference in sent:
            if when + delay == step:
                smoothed[indices] = ema * smoothed[indices] + (1 - ema) * difference
                vector[indices] += smoothed[indices]
    return merger.flat.vector.clone(), vector


@pytest.mark.parametrize(("delay", "ema"), [(0, 0.0), (1, 0.0), (3, 0.0), (5, 0.5), (0, 0.5)])
def test_a_delayed_round_is_applied_as_a_difference(ranks: Ranks, delay: int, ema: float) -> None:
    for ours, formula in ranks.run(2, delayed, delay, ema):
        torch.testing.assert_close(ours, formula, rtol=1e-6, atol=1e-6)


def gap_shrinks(settings: dict[str, Any], steps: int) -> float:
    """The distance between two workers after so many steps without gradients, over the one that they began with."""
    model = build("blocks")
    merger = dm.SPARTA(model, **settings)
    vector = merger.flat.vector
    vector += torch.randn(vector.numel(), generator=torch.Generator().manual_seed(dist.get_rank()))

    def gap() -> float:
        both = torch.stack([vector, vector])
        both[1 - dist.get_rank()] = 0
        dist.all_reduce(both)
        return (both[0] - both[1]).norm().item()

    first = gap()
    for _ in range(steps):
        merger.step()
    return gap() / first


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({"fraction": 0.2, "delay": 10, "selector": "random"}, 1e-6),  # it was 1.5e9 when indices in flight were sent again
        ({"fraction": 0.05, "delay": 20, "selector": "partitioned"}, 1e-6),  # a whole cycle
        ({"fraction": 0.05, "delay": 20, "selector": "shuffled"}, 1e-6),
        ({"fraction": 0.005, "delay": 50, "selector": "partitioned"}, 1e-6),
        ({"fraction": 1.0, "delay": 3, "selector": "random", "every": 2}, 1e-6),  # rounds of which all is in flight
        ({"fraction": 0.2, "delay": 10, "selector": "random", "ema": 0.5}, 1e-3),
    ],
    ids=str,
)
def test_delayed_rounds_bring_the_workers_together(ranks: Ranks, settings: dict, limit: float) -> None:
    for ratio in ranks.run(2, gap_shrinks, settings, 600):
        assert ratio <= limit


def test_a_delay_beyond_a_cycle_is_refused() -> None:
    """Its parameters would be sent again before what was sent first has come back: the gap grew 50 times in 600 steps."""
    with pytest.raises(dm.UserError, match=r"delay must be <= 20 steps for selector \"partitioned\", .* got 50"):
        dm.SPARTA(build("one"), fraction=0.05, delay=50)


def resumed(settings: dict[str, Any], stop: int) -> tuple[bool, int, int]:
    """Both mergers stopped, carried into new objects, and gone on; against a run without a stop."""

    def make(model):
        return [dm.SPARTA(model, **settings), dm.DiLoCo(model, every=6)]

    model = build("blocks")
    mergers = make(model)
    train(model, mergers, 16)
    for merger in mergers:
        merger.finish()
    through = mergers[0].flat.vector.clone()
    model = build("blocks")
    mergers = make(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, mergers, stop, optimizer=optimizer)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), [m.state_dict() for m in mergers]))
    again = build("blocks")
    mergers = make(again)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    again.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    for merger, merger_state in zip(mergers, state[2], strict=True):
        merger.load_state_dict(merger_state)
    indices = mergers[0].indices(mergers[0].round)
    train(again, mergers, 16 - stop, first=stop, optimizer=optimizer)
    for merger in mergers:
        merger.finish()
    vector = mergers[0].flat.vector
    return torch.equal(vector, through), int(fingerprint(indices)), int(fingerprint(vector))


@pytest.mark.parametrize("stop", [5, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {"fraction": 0.1},
        {"fraction": 0.1, "delay": 4, "every": 2},
        {"fraction": 0.3, "delay": 3, "wire": "int8", "ema": 0.3},
        {"fraction": 0.3, "delay": 4, "selector": "random"},
    ],
    ids=str,
)
def test_sparta_with_diloco_resumes_bitwise_with_rounds_in_flight(ranks: Ranks, settings: dict, stop: int) -> None:
    results = ranks.run(2, resumed, settings, stop)
    assert all(equal for equal, _, _ in results)
    assert len({(indices, vector) for _, indices, vector in results}) == 1


def composed() -> tuple[Tensor, Tensor]:
    """Sparse first, then the outer step, as two lines of a loop."""
    model, reference = build("blocks"), build("blocks")
    mergers: list[Any] = [dm.SPARTA(model, fraction=0.1), dm.DiLoCo(model, every=4, outer_lr=0.7, outer_momentum=0.9)]
    train(model, mergers, 8)
    vector = dm.flatten(reference).vector
    optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-2)
    anchor, velocity = vector.clone(), torch.zeros_like(vector)
    for step in range(1, 9):
        train(reference, [], 1, first=step - 1, optimizer=optimizer)
        indices = mergers[0].indices(step - 1)
        values = vector[indices]
        dist.all_reduce(values)
        vector[indices] = values / dist.get_world_size()
        if step % 4 == 0:
            delta = vector - anchor
            dist.all_reduce(delta)
            delta /= dist.get_world_size()
            velocity = 0.9 * velocity + delta
            anchor += 0.7 * (delta + 0.9 * velocity)
            vector.copy_(anchor)
    return mergers[0].flat.vector.clone(), vector


def test_sparta_and_diloco_compose(ranks: Ranks) -> None:
    for ours, formula in ranks.run(3, composed):
        torch.testing.assert_close(ours, formula, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"fraction": 0.0}, "fraction must be > 0, got 0.0"),
        ({"fraction": 1.5}, "fraction must be <= 1, got 1.5"),
        ({"selector": "topk"}, "selector must be 'random', 'shuffled' or 'partitioned', got 'topk'"),
        ({"delay": -1}, "delay must be >= 0, got -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(dm.UserError) as error:
        dm.SPARTA(build("one"), **settings)
    assert str(error.value) == message
