"""Golden weights of every curve, the inverse, and what is refused."""

import itertools
import math

import numpy as np
import pytest

from distmerge.errors import UserError
from distmerge.windows.curves import effective_count, frequency_response, implied_curve, token_shares, weights
from distmerge.windows.plot import plot

EVEN = {n: [j / n for j in range(n)] for n in (2, 3, 10)}
UNEVEN = [0.0, 0.1, 0.4]

GOLDEN = {
    ("linear", 2): [0.5, 0.5],
    ("linear", 3): [1 / 3, 1 / 3, 1 / 3],
    ("linear", 10): [0.1] * 10,
    ("1-sqrt", 2): [0.70710678, 0.29289322],
    ("1-sqrt", 3): [0.57735027, 0.23914631, 0.18350342],
    ("1-sqrt", 10): [
        0.31622777, 0.13098583, 0.10050896, 0.08473297, 0.07465125,
        0.06748989, 0.06206336, 0.05776717, 0.05425611, 0.0513167,
    ],
    ("cosine", 2): [0.5, 0.5],
    ("cosine", 3): [0.25, 0.5, 0.25],
    ("cosine", 10): [
        0.02447174, 0.07101976, 0.11061587, 0.13938413, 0.1545085,
        0.1545085, 0.13938413, 0.11061587, 0.07101976, 0.02447174,
    ],
    ("floor:0.1", 2): [0.45, 0.55],
    ("floor:0.1", 3): [0.3, 0.3, 0.4],
    ("floor:0.1", 10): [0.09] * 9 + [0.19],
    ("mean", 3): [1 / 3] * 3,
    ("wma", 2): [1 / 3, 2 / 3],
    ("wma", 3): [1 / 6, 2 / 6, 3 / 6],
    ("wma", 10): [i / 55 for i in range(1, 11)],
    ("ema:0.1", 2): [0.9, 0.1],
    ("ema:0.1", 3): [0.81, 0.09, 0.1],
    ("ema:0.1", 10): [0.9**9] + [0.1 * 0.9**k for k in range(8, -1, -1)],
    ("ema-normalized:0.1", 2): [0.47368421, 0.52631579],
    ("ema-normalized:0.1", 3): [0.81 / 2.71, 0.9 / 2.71, 1 / 2.71],
    ("table:0=1,0.5=0.2,1=0", 2): [0.8, 0.2],
}  # fmt: skip


@pytest.mark.parametrize(("curve", "n"), GOLDEN)
def test_golden_weights(curve: str, n: int) -> None:
    np.testing.assert_allclose(weights(curve, EVEN[n]), GOLDEN[curve, n], atol=1e-8)


UNEVEN_GOLDEN = {
    "linear": [0.1, 0.3, 0.6],
    "1-sqrt": [0.31622777, 0.31622777, 0.36754447],
    "cosine": [0.02447174, 0.32101976, 0.6545085],
    "floor:0.1": [0.09, 0.27, 0.64],
    "mean": [1 / 3] * 3,
}


@pytest.mark.parametrize("curve", UNEVEN_GOLDEN)
def test_uneven_spacing(curve: str) -> None:
    np.testing.assert_allclose(weights(curve, UNEVEN), UNEVEN_GOLDEN[curve], atol=1e-8)


MEAN_RULE_GOLDEN = {
    # The n members are the ends of n - 1 stretches that tile the decay; x = 0, 1/2, 1 and 0, 1/4, 1.
    ("linear", 3): ([0.25, 0.5, 0.25], [0.125, 0.5, 0.375]),
    ("1-sqrt", 3): ([0.47140452, 0.39052429, 0.13807119], [1 / 3, 4 / 9, 2 / 9]),
    ("cosine", 3): ([0.18169011, 0.63661977, 0.18169011], [0.04984184, 0.60021088, 0.34994728]),
}


@pytest.mark.parametrize(("curve", "n"), MEAN_RULE_GOLDEN)
def test_mean_quadrature(curve: str, n: int) -> None:
    even, uneven = MEAN_RULE_GOLDEN[curve, n]
    np.testing.assert_allclose(weights(curve, EVEN[n], "mean"), even, atol=1e-8)
    np.testing.assert_allclose(weights(curve, UNEVEN, "mean"), uneven, atol=1e-8)


def test_mean_quadrature_integrates_any_callable() -> None:
    fine = np.linspace(0, 1, 2_000_001)
    x = np.array([0.0, 0.13, 0.58, 0.8])
    got = np.cumsum(weights(lambda x: (1 - x) ** 3, x.tolist(), "mean"))[:-1]
    ends = x / x[-1]
    for a, b, ahead in zip(ends[:-1], ends[1:], 1 - got, strict=True):
        inside = fine[(fine >= a) & (fine <= b)]
        assert math.isclose(np.mean((1 - inside) ** 3), ahead, abs_tol=1e-6)


CURVES = ["mean", "wma", "linear", "cosine", "1-sqrt", "floor:0.2", "ema:0.3", "ema-normalized:0.3", "table:0=1,0.3=0.5,1=0"]


@pytest.mark.parametrize(("curve", "quadrature"), list(itertools.product(CURVES, ["endpoint", "mean"])))
@pytest.mark.parametrize("shares", [[0.0], EVEN[2], EVEN[3], EVEN[10], UNEVEN])
def test_sum_one_and_inverse(curve: str, quadrature, shares: list[float]) -> None:
    c = weights(curve, shares, quadrature)
    assert math.isclose(c.sum(), 1.0, abs_tol=1e-12)
    np.testing.assert_allclose(weights(implied_curve(c, shares), shares), c, atol=1e-12)


def test_merge_is_the_decayed_run() -> None:
    """Any optimizer's updates, scaled by the curve's factors, end where the merge is."""
    updates = np.random.default_rng(0).normal(size=(9, 5))
    thetas = np.concatenate([np.zeros((1, 5)), np.cumsum(updates, axis=0)])
    c = weights("cosine", EVEN[10])
    decayed = sum((1 + math.cos(math.pi * i / 10)) / 2 * updates[i - 1] for i in range(1, 10))
    np.testing.assert_allclose(c @ thetas, decayed, atol=1e-12)


def test_three_ways_equal_pairs() -> None:
    """Merging pair by pair with the matching weights is the three-way merge."""
    thetas = np.random.default_rng(1).normal(size=(3, 4))
    c = weights("1-sqrt", UNEVEN)
    pair = (c[0] * thetas[0] + c[1] * thetas[1]) / (c[0] + c[1])
    np.testing.assert_allclose((c[0] + c[1]) * pair + c[2] * thetas[2], c @ thetas, atol=1e-12)


def test_missing_block_keeps_the_curve() -> None:
    """Without block 2 of 4, the others' factors stay the curve's at their own positions."""
    c = weights("linear", [0.0, 0.25, 0.75])
    np.testing.assert_allclose(c, [0.25, 0.5, 0.25])


def test_token_shares() -> None:
    np.testing.assert_allclose(token_shares([100, 200, 400], 500), [0, 0.25, 0.75])
    np.testing.assert_allclose(token_shares([100, 200, 300]), [0, 1 / 3, 2 / 3])
    np.testing.assert_allclose(token_shares([7]), [0])


def test_effective_count_and_response() -> None:
    assert effective_count([0.1] * 10) == pytest.approx(10)
    assert effective_count([1.0]) == 1
    response = frequency_response([0.25] * 4, EVEN_4, [0, 1, 2, 4])
    np.testing.assert_allclose(response, [1, 0, 0, 1], atol=1e-12)


EVEN_4 = [0.0, 0.25, 0.5, 0.75]


def test_plot(tmp_path) -> None:
    plot(weights("cosine", EVEN[10]), EVEN[10], tmp_path / "merge.svg", "cosine")
    assert "<svg" in (tmp_path / "merge.svg").read_text()


@pytest.mark.parametrize(
    ("curve", "shares", "words"),
    [
        ("lineer", EVEN[2], "lineer"),
        ("ema", EVEN[2], "ema"),
        ("ema:1.5", EVEN[2], "(0, 1)"),
        ("floor:x", EVEN[2], "floor:x"),
        ("table:0=1,1", EVEN[2], "table:X=D"),
        ("table:0=1,0.5=0.2,0.4=0.1", EVEN[2], "increasing x"),
        (lambda x: x, EVEN[2], "must be 1 at x = 0"),
        (lambda x: 1 - 2 * x, EVEN[2], "stay in [0, 1]"),
        (lambda x: 1 - 0.5 * math.sin(math.pi * x), EVEN[2], "not increase"),
        ("linear", [0.0, 0.5, 0.5], "increase"),
        ("linear", [0.5, 0.25], "increase"),
        ("linear", [], "at least one"),
    ],
)
def test_refused_in_one_line(curve, shares, words: str) -> None:
    with pytest.raises(UserError) as caught:
        weights(curve, shares)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_positions_must_increase() -> None:
    with pytest.raises(UserError, match="increase"):
        token_shares([1, 1, 2])
    with pytest.raises(UserError, match="must end after"):
        token_shares([1, 2], 2)
