"""Merge advice: whether merging a window should help, how many members to merge and by which curve, from one Gram matrix.

The members are modeled as points on a smooth path (the drift), each with its own noise, s^2 = E|noise|^2. In training the noise
of members k apart is correlated by r^k. The differences delta of successive members tell path and noise apart: noise makes
neighbouring differences oppose each other and leaves all others uncorrelated. So with r = 0

    E<delta_i, delta_i+1> = <d_i, d_i+1> - s^2,      E<delta_i-1, delta_i+1> = <d_i-1, d_i+1>,

where d are the steps of the drift. A step of a smooth drift agrees with the next one about as well as with the one after that,
so s^2 is estimated as the excess of the second product over the first. A drift that is straight, slows down or turns adds
nothing to the estimate, and neither does a random walk. The expected squared distance of a merge with weights c_1 ... c_n from
where the newest member would be without its noise is then estimated as

    |sum c theta - theta_n|^2 + s^2 (2 sum_j c_j r^(n - j) - 1)

This is Stein's unbiased risk estimate (Stein 1981, https://doi.org/10.1214/aos/1176345632). It uses the drift as observed and
assumes nothing about its form. For the newest member alone the estimate is s^2. The advice is the curve and the number of
members with the smallest estimate. Plain distances weigh all directions equally, although the drift is mostly in flat ones and
the noise in steep ones, so they favor short windows. Distances weighted by the curvature's diagonal are what a quadratic loss
would see. Either way the advice is a hint and not a proof.

Source of the comparison of drift and noise: PMA, https://arxiv.org/abs/2505.12082.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from distmerge.windows.curves import effective_count, token_shares, weights

CURVES = ("linear", "1-sqrt", "cosine", "wma")


@dataclass(frozen=True)
class Advice:
    """What to merge, and the estimates behind it.

    Attributes:
        merge: whether the best merge is expected to be closer to the noise-free newest member than the newest member itself.
        curve, count: the best curve, and how many of the newest members to merge by it.
        gain: the share of the newest member's squared noise that the merge is expected to remove.
        ratio: |theta_n - theta_1|^2 / sum |delta_i|^2 of the window; about 1/(n-1) for noise, n-1 for a straight line.
        cosines: of successive deltas; -1/2 for independent noise, 1 for a straight line.
        noise: s^2.
        drift: the squared length of the path over the whole window, estimated from the first and the last member.
        effective: N_eff of the advised weights.
    """

    merge: bool
    curve: str
    count: int
    gain: float
    ratio: float
    cosines: list[float]
    noise: float
    drift: float
    effective: float


MAX_CORRELATION = 0.8
"""Upper bound of the estimated correlation of neighbouring members' noise: beyond it, a few members do not suffice to tell
noise from drift."""


class Noise(NamedTuple):
    """The noise of the members.

    Attributes:
        square: its expected squared length, s^2.
        correlation: r, between neighbouring members, in [0, 1); between members k apart it is r^k.
    """

    square: float
    correlation: float


def gram_of(vectors: list[Tensor]) -> np.ndarray:
    """``[n, n]`` float64: inner products of the members' differences from the first one.

    Args:
        vectors: the members, ``[d]`` each, oldest first.
    """
    gram = np.zeros((len(vectors), len(vectors)))
    size = 1 << 18
    for start in range(0, vectors[0].numel(), size):
        gram += gram_of_chunk([vector[start : start + size] for vector in vectors])
    return gram


def gram_of_chunk(members: Iterable[Tensor], curvature: Tensor | None = None) -> np.ndarray:
    """The Gram matrix over one chunk of the members' elements. The matrices of all chunks and tensors add up to the whole one.

    Args:
        curvature: of the chunk's elements, as weights of the squared distances.
    """
    stacked = torch.stack([member.to(torch.float32) for member in members])
    deltas = (stacked - stacked[0]).double()
    weighted = deltas if curvature is None else deltas * curvature
    return (weighted @ deltas.T).numpy()


def distances(gram: np.ndarray) -> np.ndarray:
    """``[n, n]`` squared distances between members, from their Gram matrix."""
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)


def advise(gram: np.ndarray, starts: list[float], end: float | None = None) -> Advice:
    """Choose the curve and the number of newest members with the smallest estimated risk.

    Args:
        gram: ``[n, n]`` of the members, oldest first; at least two.
        starts, end: their positions, as in :func:`distmerge.windows.curves.token_shares`.
    """
    n = len(gram)
    x = token_shares(starts, end)
    squared = distances(gram)
    steps = np.array([squared[i, i + 1] for i in range(n - 1)])
    noise = noise_of(gram, x)
    drift = max(0.0, float(squared[0, -1]) - 2 * noise.square) / float(x[-1]) ** 2
    best = ("linear", 1, noise.square)
    for count in range(2, n + 1):
        shares = token_shares(starts[-count:], end)
        for curve in CURVES:
            cost = risk(weights(curve, shares.tolist()), gram, noise)
            if cost < best[2]:
                best = (curve, count, cost)
    curve, count, cost = best
    c = weights(curve, token_shares(starts[-count:], end).tolist())
    return Advice(
        merge=count > 1,
        curve=curve,
        count=count,
        gain=1 - cost / noise.square if noise.square > 0 else 0.0,
        ratio=float(squared[0, -1] / steps.sum()) if steps.sum() > 0 else 0.0,
        cosines=cosines(squared),
        noise=noise.square,
        drift=drift,
        effective=effective_count(c),
    )


def noise_of(gram: np.ndarray, x: np.ndarray) -> Noise:
    """Estimate the noise from differences of members that are 1, 2 or 3 apart; 0 if there is no evidence of any.

    For three successive differences over steps of lengths h_1, h_2, h_3

        <delta_1, delta_3> / h_1 h_3 - (<delta_1, delta_2> / h_1 h_2 + <delta_2, delta_3> / h_2 h_3) / 2

    has the mean s^2 (1 / h_1 h_2 + 1 / h_2 h_3) / 2, whatever a straight drift adds. If the noise is correlated by r^k, the
    estimate from members k apart has the mean s^2 (1 - r^k)^3. Two of these estimates, for k = 1 and for the k with the largest
    one, give s^2 and r. Three members have only one pair of differences; how much these oppose each other is a lower bound. Two
    members tell nothing.

    Args:
        gram: ``[n, n]`` inner products of the members.
        x: ``[n]`` their positions, increasing.
    """
    if len(x) < 3:
        return Noise(0.0, 0.0)
    if len(x) == 3:
        differences = np.diff(np.diff(gram, axis=0), axis=1)
        return Noise(max(0.0, -float(differences[0, 1])), 0.0)
    found = {apart: excess(gram, x, apart) for apart in (1, 2, 3) if len(x) > 3 * apart}
    apart = max(found, key=lambda apart: found[apart])
    if found[apart] <= 0:
        return Noise(0.0, 0.0)
    root = (max(0.0, found[1]) / found[apart]) ** (1 / 3)  # (1 - r) / (1 - r^k), with k = apart
    r = 1 / max(root, 1e-3) - 1  # = r + ... + r^(k-1), which is r itself for k = 2
    if apart == 3:
        r = (math.sqrt(1 + 4 * r) - 1) / 2  # solves r + r^2 = the value above
    r = min(MAX_CORRELATION, r) if apart > 1 else 0.0
    return Noise(found[apart] / (1 - r**apart) ** 3, r)


def excess(gram: np.ndarray, x: np.ndarray, apart: int) -> float:
    """The noise as differences over ``apart`` members show it: how much better each of these agrees with the one after the next
    than with the next one."""
    total = scale = 0.0
    for first in range(len(x) - 3 * apart):
        at = [first, first + apart, first + 2 * apart, first + 3 * apart]
        h = np.diff(x[at])
        products = np.diff(np.diff(gram[np.ix_(at, at)], axis=0), axis=1)
        speeds = products / np.outer(h, h)
        total += float(speeds[0, 2] - (speeds[0, 1] + speeds[1, 2]) / 2)
        scale += float(1 / (h[0] * h[1]) + 1 / (h[1] * h[2])) / 2
    return total / scale


def risk(c: np.ndarray, gram: np.ndarray, noise: Noise) -> float:
    """The estimated squared distance of a merge of the newest members from where the newest one would be without its noise.

    By chance the estimate can fall below the noise that is left in the merge, ``c^T N c`` with the noise's covariances N, which
    is therefore its lower bound.

    Args:
        c: ``[m]`` weights of the newest m members, oldest first.
        gram: ``[n, n]`` of all members.
    """
    away = np.zeros(len(gram))
    away[-len(c) :] = c
    away[-1] -= 1
    ages = np.arange(len(c) - 1, -1, -1)
    covariances = noise.square * noise.correlation ** np.abs(ages[:, None] - ages[None, :])
    measured = float(away @ gram @ away) + 2 * float(c @ covariances[:, -1]) - noise.square
    return max(measured, float(c @ covariances @ c))


def cosines(squared: np.ndarray) -> list[float]:
    """Cosines of successive deltas, from the ``[n, n]`` squared distances by the law of cosines."""
    found = []
    for i in range(len(squared) - 2):
        a, b, both = squared[i, i + 1], squared[i + 1, i + 2], squared[i, i + 2]
        found.append(float((both - a - b) / (2 * np.sqrt(a * b))) if a > 0 and b > 0 else 0.0)
    return found


def explain(advice: Advice, names: list[str]) -> str:
    """The advice in words, with its reasons.

    Args:
        names: of the members, oldest first.
    """
    n = len(names)
    mean_cosine = float(np.mean(advice.cosines)) if advice.cosines else float("nan")
    lines = [
        f"drift/noise ratio of {n} members: {advice.ratio:.3f} (noise alone {1 / (n - 1):.3f}, a straight line {n - 1})",
        f"cosine of successive deltas: {mean_cosine:.3f} (independent noise -0.5, a straight line 1)",
        f"fitted: noise {advice.noise:.4g} squared per member, drift {advice.drift:.4g} squared over the window",
    ]
    if advice.merge:
        lines.append(
            f"merging should help: the newest {advice.count} ({names[-advice.count]} to {names[-1]}) by {advice.curve}, "
            f"N_eff {advice.effective:.1f}, should remove {advice.gain:.0%} of the newest member's squared noise"
        )
    else:
        lines.append("merging should not help: the window drifts faster than its noise averages out; use the newest member")
    return "\n".join(lines)
