"""Merge weights from learning-rate curves, and the curve that given weights imply.

A merge of checkpoints that were trained at a constant learning rate does to the updates between them what a decay of the
learning rate would have done (WSM, https://arxiv.org/abs/2507.17634): with theta_j = theta_0 + u_1 + ... + u_j,

    sum_j c_j theta_j = theta_0 + sum_i w_i u_i,      w_i = sum_{j >= i} c_j

so w_i is the factor by which the decay would have scaled update u_i, whatever the optimizer. A decay curve d over x in [0, 1],
with d(0) = 1, gives the factors, and their differences are the merge weights.

    c = weights("1-sqrt", token_shares(starts, end))

For example, three members at x = 0, 1/3, 2/3 with the linear curve have the factors d(1/3) = 2/3 and d(2/3) = 1/3. Their
weights are 1 - 2/3, 2/3 - 1/3 and 1/3: the plain mean.

Curves by name: ``linear`` 1 - x; ``cosine`` (1 + cos pi x) / 2; ``1-sqrt`` 1 - sqrt x; ``floor:R`` R + (1 - R)(1 - x).
Averages by name, which ignore the positions of the members i = 1 ... n: ``mean`` 1/n; ``wma`` i / (n (n + 1) / 2); ``ema:A``
A (1 - A)^(n - i), except that the oldest member has (1 - A)^(n - 1), as in the recursion; ``ema-normalized:A``
A (1 - A)^(n - i), divided by the sum.
"""

from __future__ import annotations

import cmath
import itertools
import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from distmerge.errors import UserError
from distmerge.rules.decay import DECAYS, Decay, Table, with_floor

Curve = str | Decay | Sequence[tuple[float, float]]
"""A name, a function, or a table of points (x, d) that are connected by straight lines."""

Quadrature = Literal["endpoint", "mean"]
"""How a curve becomes factors.

endpoint: w_i = d(x_i), where x_i is the share of the window's tokens before member i. This is meant for blocks that tile the
window: a merge of block means then follows d piecewise linearly. mean: w_i is the mean of d between members i - 1 and i. This
is meant for snapshots: the n - 1 intervals between them make up the whole decay."""

NAMES = ("mean", "wma", *DECAYS, "floor:R", "ema:A", "ema-normalized:A")


def weights(curve: Curve, shares: Sequence[float], quadrature: Quadrature = "endpoint") -> np.ndarray:
    """The members' merge weights, oldest first.

    Args:
        curve: see the module's docstring.
        shares: ``[n]``, for each member the share of the window's tokens before it: from 0, increasing, below 1.
        quadrature: how a decay becomes factors; averages ignore it.

    Returns:
        ``[n]`` float64, with sum 1.

    Raises:
        UserError: for an unknown name, a parameter out of range, positions that don't increase, or a curve that
            increases or leaves [0, 1].
    """
    x = checked_shares(shares)
    if quadrature not in get_args(Quadrature):
        raise UserError(f'quadrature must be "endpoint" or "mean", got {quadrature!r}')
    if isinstance(curve, str) and (average := named_average(curve, len(x))) is not None:
        return average
    decay = find_decay(curve)
    check_decay(decay, curve)
    return differences(factors(decay, x, quadrature))


def factors(decay: Decay, x: np.ndarray, quadrature: Quadrature) -> np.ndarray:
    """``[n - 1]``: the factor w_i of each update between two members."""
    if quadrature == "endpoint":
        return np.array([decay(share) for share in x[1:]])
    ends = x / x[-1] if len(x) > 1 else x
    return np.array([mean_over(decay, a, b) for a, b in itertools.pairwise(ends)])


def differences(factors: np.ndarray) -> np.ndarray:
    """``[n]`` weights from ``[n - 1]`` factors: c_0 = 1 - w_1, then c_j = w_j - w_(j+1), and last w_(n-1) itself."""
    return -np.diff(np.concatenate([[1.0], factors, [0.0]]))


def mean_over(decay: Decay, a: float, b: float) -> float:
    """The mean of a decay over [a, b].

    It is integrated over sqrt(x), in which all named curves are smooth, so that Gauss-Legendre quadrature is exact for them up
    to rounding. A table is integrated from kink to kink.
    """
    kinks = decay.x[(decay.x > a) & (decay.x < b)] if isinstance(decay, Table) else []
    nodes, node_weights = np.polynomial.legendre.leggauss(48)
    integral = 0.0
    for low, high in itertools.pairwise([a, *kinks, b]):
        middle, half = (math.sqrt(high) + math.sqrt(low)) / 2, (math.sqrt(high) - math.sqrt(low)) / 2
        roots = middle + half * nodes
        integral += sum(w * half * 2 * r * decay(min(r * r, 1.0)) for w, r in zip(node_weights, roots, strict=True))
    return float(integral / (b - a))


def named_average(name: str, n: int) -> np.ndarray | None:
    """The weights of an average that ignores positions; None if the name is that of a decay."""
    kind, _, parameter = name.partition(":")
    age = np.arange(n - 1, -1, -1, dtype=np.float64)
    match kind:
        case "mean":
            return np.full(n, 1 / n)
        case "wma":
            return (n - age) / (n * (n + 1) / 2)
        case "ema":
            a = number(name, parameter)
            kept = a * (1 - a) ** age
            kept[0] = (1 - a) ** (n - 1)
            return kept
        case "ema-normalized":
            a = number(name, parameter)
            kept = a * (1 - a) ** age
            return kept / kept.sum()
    return None


def find_decay(curve: Curve) -> Decay:
    """The decay that a curve stands for."""
    if callable(curve):
        return curve
    if not isinstance(curve, str):
        return table_of(curve)
    if curve in DECAYS:
        return DECAYS[curve]
    if curve.startswith("floor:"):
        return with_floor(DECAYS["linear"], number(curve, curve.partition(":")[2]))
    if curve.startswith("table:"):
        return table_of(parse_points(curve))
    raise UserError(f"curve must be one of {', '.join(NAMES)} or table:X=D,X=D,..., got {curve!r}")


def number(name: str, parameter: str) -> float:
    """The parameter of a curve's name, such as 0.1 in ``floor:0.1``."""
    try:
        value = float(parameter)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise UserError(f"curve {name!r} must have a number in (0, 1) after its colon")
    return value


def table_of(points: Sequence[tuple[float, float]]) -> Table:
    try:
        return Table(points)
    except ValueError as error:
        raise UserError(str(error)) from None


def parse_points(curve: str) -> list[tuple[float, float]]:
    """The points of ``table:0=1,0.5=0.2,1=0``: (0, 1), (0.5, 0.2) and (1, 0)."""
    try:
        pairs = [point.split("=") for point in curve.partition(":")[2].split(",")]
        return [(float(x), float(d)) for x, d in pairs]
    except ValueError:
        raise UserError(f"curve must be written table:X=D,X=D,..., got {curve!r}") from None


def check_decay(decay: Decay, curve: Curve) -> None:
    """Refuse a function that is not a decay: it must begin at 1, never increase and stay in [0, 1]."""
    name = curve if isinstance(curve, str) else getattr(curve, "__name__", "the given one")
    values = [decay(x) for x in np.linspace(0, 1, 257).tolist()]
    if not math.isclose(values[0], 1.0, abs_tol=1e-9):
        raise UserError(f"curve {name} must be 1 at x = 0, got {values[0]}")
    for index, (before, value) in enumerate(itertools.pairwise(values), start=1):
        if not (-1e-12 <= value <= before + 1e-12):
            what = "stay in [0, 1]" if value <= before else "not increase"
            raise UserError(f"curve {name} must {what}, got {before:.6g} then {value:.6g} at x = {index / 256:.4g}")


def checked_shares(shares: Sequence[float]) -> np.ndarray:
    x = np.asarray(shares, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise UserError("a merge needs at least one member, got none")
    if x[0] != 0 or np.any(np.diff(x) <= 0) or x[-1] >= 1:
        raise UserError(f"positions must begin at 0, increase and stay below 1, got {[round(float(v), 6) for v in x]}")
    return x


def token_shares(starts: Sequence[float], end: float | None = None) -> np.ndarray:
    """Positions as shares of the window, ``[n]`` float64 from 0, below 1.

    Args:
        starts: ``[n]`` tokens (or steps) before each member, increasing.
        end: where the window ends. By default it is one mean spacing after the last start, which suits snapshots.

    Raises:
        UserError: if there are no members, or the positions don't increase up to the end.
    """
    x = np.asarray(starts, dtype=np.float64)
    if len(x) == 0:
        raise UserError("a merge needs at least one member, got none")
    if np.any(np.diff(x) <= 0):
        raise UserError(f"positions must increase, got {[float(v) for v in x]}")
    if end is None:
        end = float(x[-1] + ((x[-1] - x[0]) / (len(x) - 1) if len(x) > 1 else 1.0))
    if end <= x[-1]:
        raise UserError(f"the window must end after the last member begins, at {x[-1]:g}, got {end:g}")
    return (x - x[0]) / (end - x[0])


def implied_curve(members: Sequence[float] | np.ndarray, shares: Sequence[float] | np.ndarray) -> Table:
    """The decay that merge weights imply: the inverse of :func:`weights` with the endpoint rule.

    The table holds (x_j, sum of the weights from member j on), and stays constant after the last member. Negative weights imply
    a curve that increases somewhere: :func:`weights` would refuse it, but the table shows it.

    Args:
        members: ``[n]`` the members' weights, oldest first, with sum 1.
        shares: ``[n]`` their positions, as in :func:`weights`.

    Raises:
        UserError: if the numbers of weights and positions differ, or the sum is not 1.
    """
    c, x = np.asarray(members, dtype=np.float64), checked_shares(list(shares))
    if len(c) != len(x) or not math.isclose(c.sum(), 1.0, abs_tol=1e-6):
        raise UserError(f"weights must be one for each of {len(x)} positions and have sum 1, got {c.tolist()}")
    behind = 1 - np.concatenate([[0.0], np.cumsum(c)[:-1]])
    return Table([*zip(x.tolist(), behind.tolist(), strict=True), (1.0, float(behind[-1]))])


def effective_count(members: Sequence[float] | np.ndarray) -> float:
    """N_eff = 1 / sum c^2: the number of members whose plain mean would reduce independent noise as much."""
    return float(1 / np.square(np.asarray(members)).sum())


def frequency_response(members: Sequence[float] | np.ndarray, shares: Sequence[float], cycles: Sequence[float]) -> np.ndarray:
    """``[len(cycles)]``: |H(f)|, the share of an oscillation with ``f`` cycles per window that passes through the merge.

    The merge is a low-pass filter over time: H(f) = sum_j c_j exp(-2 pi i f x_j), so H(0) = 1.

    Args:
        members, shares: ``[n]`` the members' weights and positions, as in :func:`implied_curve`.
        cycles: the frequencies f, in cycles per window.
    """
    c, x = np.asarray(members, dtype=np.float64), checked_shares(shares)
    return np.array([abs(sum(w * cmath.exp(-2j * math.pi * f * at) for w, at in zip(c, x, strict=True))) for f in cycles])
