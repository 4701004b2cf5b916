"""Rules on tensors in memory: what holds for all of them, and the exact thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distmerge.rules import catalogue
from distmerge.rules.combine import Combine
from distmerge.rules.mean import WeightedMean
from distmerge.rules.passthrough import Scaled
from distmerge.rules.protocol import Target, run
from distmerge.rules.random_masks import bar, below, chance, key_of, uniform, upper
from distmerge.rules.sce import Sce
from distmerge.rules.slerp import Nuslerp, Slerp
from distmerge.rules.sparsify import AtRandom, ByMagnitude, Magprune, ascending
from distmerge.rules.stock import ModelStock
from distmerge.rules.task import Ptm, TaskArithmetic, TaskVectors
from tests.rules.coins import coins

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPE = (37, 53)
NUMEL = 37 * 53


def rules(dtype: torch.dtype) -> dict[str, tuple]:
    """name -> rule, members, whether there is a base."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    elect = Combine("after", "positive", "weights")
    thin = {
        "ties": ByMagnitude([0.3, 0.6], None, "first", dtype),
        "ties_keep": ByMagnitude([0.3, 1.0], None, "keep", dtype),
        "breadcrumbs": ByMagnitude([0.5, 0.2], [0.1, 0.0], "first", dtype),
        "dare": AtRandom([0.5, 0.2], [1, 2]),
        "della": Magprune([0.5, 1.0], [0.1, 0.1], [3, 4], 53, dtype),
    }
    found: dict[str, tuple] = {
        name: (TaskVectors([0.7, 0.5], elect, one, "l1", dtype, NUMEL, 53 if name == "della" else 1), 2, True)
        for name, one in thin.items()
    }
    return found | {
        "mean": (WeightedMean([1.0, 2.0], True, wide), 2, False),
        "scaled": (Scaled(0.5, dtype), 1, False),
        "slerp": (Slerp(0.3, wide), 2, False),
        "nuslerp": (Nuslerp(0.3, None, False, dtype), 2, True),
        "nuslerp_columns": (Nuslerp(0.3, 53, False, dtype), 2, True),
        "model_stock": (ModelStock(2, None, dtype, 1e-6), 2, True),
        "sce": (Sce(0.4, NUMEL, dtype), 2, True),
        "ptm": (Ptm([0.5], wide), 2, True),
        "task": (TaskArithmetic([0.7, 0.5], Combine(), dtype), 2, True),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", rules(torch.float32))
def test_inputs_stay_as_they_are_and_the_result_is_finite(name, dtype):
    rule, count, based = rules(dtype)[name]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(count + 1)]
    before = [tensor.clone() for tensor in tensors]
    merged = run(rule, tensors[:count], tensors[count] if based else None, block=500)
    assert all(torch.equal(one, two) for one, two in zip(tensors, before, strict=True))
    assert merged.shape == SHAPE and bool(torch.isfinite(merged).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("combine", [Combine(), Combine(divide="weights", scale=0.7), Combine(divide="count")])
@pytest.mark.parametrize("members", [1, 2, 3])
def test_task_arithmetic_needs_no_stack_of_task_vectors(dtype, combine, members):
    generator = torch.Generator().manual_seed(4)
    base, *others = [torch.randn(NUMEL, generator=generator).to(dtype) for _ in range(members + 1)]
    weights = [0.3, 0.9, 0.4][:members]
    stacked = run(TaskVectors(weights, combine, None, "none", dtype, NUMEL), others, base)
    assert torch.equal(run(TaskArithmetic(weights, combine, dtype), others, base), stacked)


@pytest.mark.parametrize("columns", [1, 53, 70_000])
def test_ranks_are_those_of_a_stable_sort(columns):
    generator = torch.Generator().manual_seed(5)
    for high in (1 << 15, (1 << 31) - 1):
        size = torch.randint(0, high, (3, columns), generator=generator, dtype=torch.int32)
        size[:, columns // 2 :] = size[:, : columns - columns // 2].clone()
        assert torch.equal(ascending(size), size.argsort(dim=1, stable=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.001, 0.25, 0.5, 0.999])
def test_a_trim_keeps_exactly_k(dtype, density):
    """With many equal magnitudes: the k largest, the first of the equal ones."""
    generator = torch.Generator().manual_seed(1)
    values = (torch.randint(-20, 21, (5000,), generator=generator).double() / 8).to(dtype)
    combine = Combine()
    rule = TaskVectors([1.0], combine, ByMagnitude([density], None, "first", dtype), "none", dtype, 5000)
    merged = run(rule, [values], torch.zeros_like(values), block=700)
    k = max(1, int(density * 5000))
    chosen = values.double().abs().argsort(descending=True, stable=True)[:k]
    expected = torch.zeros_like(values)
    expected[chosen] = values[chosen]
    assert torch.equal(merged.to(dtype), expected)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.45])
@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_breadcrumbs_keep_the_middle(density, gamma):
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-9, 10, (3001,), generator=generator).float() / 4
    rule = TaskVectors([1.0], Combine(), ByMagnitude([density], [gamma], "first", torch.float32), "none", torch.float32, 3001)
    merged = run(rule, [values], torch.zeros_like(values), block=450)
    keep, top = int(density * 3001), int(gamma * 3001)
    bottom = max(0, 3001 - keep - top)
    chosen = values.abs().argsort(stable=True)[bottom : bottom + keep]
    expected = torch.zeros_like(values)
    expected[chosen] = values[chosen]
    assert torch.equal(merged, expected)


def test_random_numbers_depend_on_key_and_place_alone():
    key = key_of(0, "tensor", 1)
    whole = upper(key, 0, 7000)
    for start, count in ((1000, 2001), (4095, 1000), (4096, 7), (0, 0)):
        assert np.array_equal(whole[start : start + count], upper(key, start, count))
    assert not np.array_equal(whole, upper(key_of(0, "tensor", 2), 0, 7000))
    far = uniform(key, (1 << 32) - 4, 4), uniform(key, 1 << 32, 4), uniform(key, 0, 4)
    assert len({tuple(part.tolist()) for part in far}) == 3
    draws = uniform(key, 0, 1 << 20)
    other = uniform(key_of(0, "tensor", 2), 0, 1 << 20)
    low = draws * 65536 % 1  # the lower bits by themselves, and with the upper ones
    for centred in (
        draws - 0.5, (draws - 0.5)[:-1] * (draws - 0.5)[1:], (draws - 0.5) * (other - 0.5),
        low - 0.5, (draws - 0.5) * (low - 0.5),
    ):  # fmt: skip
        assert abs(float(centred.mean() / centred.std())) * len(centred) ** 0.5 < 4
    odds = torch.linspace(0, 1, 1 << 20)
    assert torch.equal(below(key, 0, bar(odds)), draws < odds.double())
    assert torch.equal(below(key, 1237, bar(odds[1237:])), (draws < odds.double())[1237:])
    counts = torch.histc(draws, 64, 0, 1)
    assert float(((counts - (1 << 14)) ** 2 / (1 << 14)).sum()) < 120  # chi-squared, 63 degrees of freedom


@pytest.mark.parametrize("odds", (0.5, 0.25, 0.1, 205 / 2048, 1 / 3, 1e-5, 1e-9, 0.0, 1.0, 1 - 2**-12, 1 - 2**-44, 1 - 2**-50))
def test_coins_have_one_chance_and_depend_on_key_and_place_alone(odds):
    key, share = key_of(0, "tensor", 1), round(odds * 2**44) / 2**44
    for start, count in ((0, 100_003), (1, 64), (63, 130), (64, 64), (77, 0), ((1 << 33) + 5, 1000)):
        assert torch.equal(chance(key, odds, start, count), coins(key, start, count) < share)
    thrown = chance(key, odds, 0, 1 << 20).double()
    assert abs(float(thrown.mean()) - share) <= 4 * (share * (1 - share) / len(thrown)) ** 0.5
    if 0.01 < odds < 0.99:
        fair = thrown - share
        other = chance(key_of(0, "tensor", 2), odds, 0, 1 << 20).double() - share
        for mixed in (fair[:-1] * fair[1:], fair[:-64] * fair[64:], fair * other):
            assert abs(float(mixed.mean() / mixed.std())) * len(mixed) ** 0.5 < 4


def test_slerp_keeps_the_norm_and_falls_back_to_a_line():
    a, b = torch.eye(2)[0].repeat(50), torch.eye(2)[1].repeat(50)
    assert run(Slerp(0.5), [a, b]).norm() == pytest.approx(float(a.norm()), rel=1e-6)
    assert torch.allclose(run(Slerp(0.25), [a, 2 * a]), 1.25 * a)


def test_two_opposed_members_elect_by_the_rule_for_cancellation():
    base, one = torch.zeros(4), torch.tensor([1.0, -1.0, 2.0, 0.0])
    for on_cancel, expected in (("positive", [1.0, 1.0, 2.0, 0.0]), ("zero", [0.0] * 4)):
        combine = Combine("before", on_cancel, "count")
        merged = run(TaskVectors([1.0, 1.0], combine, None, "none", torch.float32, 4), [one, -one], base)
        assert merged.tolist() == expected


@pytest.mark.parametrize("name", [name for name in catalogue.names() if catalogue.entry(name).from_vectors])
def test_a_rule_from_vectors_gives_the_base_plus_the_merge_of_the_vectors(name: str) -> None:
    """What a sweep relies on where it keeps task vectors: numbers are of few bits, so that the sums are exact."""
    generator = torch.Generator().manual_seed(0)
    members = 1 if catalogue.entry(name).most == 1 else 3
    base = torch.randint(-64, 64, (8, 32), generator=generator).float()
    vectors = [torch.randint(-64, 64, (8, 32), generator=generator).float() for _ in range(members)]
    each = tuple({"weight": 1.0, "density": 0.5, "omega": 0.5} for _ in vectors)
    target = Target("x", (8, 32), each, {"lambda": 0.5, "rescale": False}, {"compat": "mergekit", "arithmetic": "float32"})
    whole = run(catalogue.build(name, target), [base + vector for vector in vectors], base)
    alone = run(catalogue.build(name, target), vectors, torch.zeros_like(base))
    assert torch.allclose(whole, base + alone, atol=1e-5)
    assert not torch.equal(whole, base)
