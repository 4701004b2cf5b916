"""Merge advice: whether merging a window should help, which part of it and by which curve, from one Gram matrix.

Members are taken as points of a smooth path, each with noise of its own, s^2 = E|noise|^2, which in training is correlated
from one to the next, as r^k over k. The two are told apart by the differences of successive members: noise makes neighbouring
ones oppose each other and leaves others alone, so that with r = 0

    E<delta_i, delta_i+1> = <d_i, d_i+1> - s^2,      E<delta_i-1, delta_i+1> = <d_i-1, d_i+1>,

while the steps d of a drift agree with their neighbours as with the next but one. So s^2 is by how much the latter exceed the
former; a drift that is straight, slows down or turns adds nothing to it, and neither does a random walk. A merge with weights
c, the last of them c_n, then lies

    |sum c theta - theta_n|^2 + s^2 (2 sum_j c_j r^(n - j) - 1)

from where the newest member would be without its noise: Stein's unbiased estimate of risk (Stein 1981,
https://doi.org/10.1214/aos/1176345632), which takes the drift as it was, of whatever form. The newest member alone lies s^2
away. The advice is the curve and length with the least estimate. Plain distances count all directions alike, though the
drift's are mostly flat and the noise's steep, so they lean to short windows; weighed by the curvature's diagonal they are what
a quadratic loss would see. Either way it is a reason to look, no verdict.

Source of drift against noise: PMA, https://arxiv.org/abs/2505.12082.
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
    """Attributes:
    merge: whether the best merge is expected to be nearer to the valley's floor than the newest block.
    curve, count: the best curve, and how many of the newest blocks.
    gain: the share of the newest block's squared noise that the merge is expected to take away.
    ratio: |theta_n - theta_1|^2 / sum |delta_i|^2 of the window; about 1/(n-1) for noise, n-1 for a straight line.
    cosines: of successive deltas; -1/2 for independent noise, 1 for a straight line.
    noise, drift: s^2; the squared length of the path over the whole window, as far as the first and the last member tell.
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


MOST_CORRELATED = 0.8
"""Of the noise of neighbouring members: with more, a few members cannot tell it from a drift."""


class Noise(NamedTuple):
    """The members' own noise.

    Attributes:
        square: its squared length, s^2.
        correlation: between neighbouring members, in [0, 1); between members k apart it is the k-th power.
    """

    square: float
    correlation: float


def gram_of(vectors: list[Tensor]) -> np.ndarray:
    """``[n, n]`` float64: inner products of the members' distances from the first one."""
    gram = np.zeros((len(vectors), len(vectors)))
    size = 1 << 18
    for start in range(0, vectors[0].numel(), size):
        gram += gram_of_chunk([vector[start : start + size] for vector in vectors])
    return gram


def gram_of_chunk(members: Iterable[Tensor], curvature: Tensor | None = None) -> np.ndarray:
    """The same of one chunk; chunks and tensors add up.

    Args:
        curvature: of the chunk's elements, to weigh squared distances with.
    """
    stacked = torch.stack([member.to(torch.float32) for member in members])
    deltas = (stacked - stacked[0]).double()
    weighed = deltas if curvature is None else deltas * curvature
    return (weighed @ deltas.T).numpy()


def distances(gram: np.ndarray) -> np.ndarray:
    """``[n, n]`` squared distances between members."""
    squares = np.diag(gram)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * gram, 0.0)


def advise(gram: np.ndarray, starts: list[float], end: float | None = None) -> Advice:
    """What to merge.

    Args:
        gram: of the members, oldest first; at least two.
        starts, end: positions, as of :func:`distmerge.windows.curves.token_shares`.
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
    """The noise, from differences of members that are 1, 2 or 3 apart; none where nothing speaks for any.

    With steps of the lengths h_1, h_2, h_3, of three successive differences

        <delta_1, delta_3> / h_1 h_3 - (<delta_1, delta_2> / h_1 h_2 + <delta_2, delta_3> / h_2 h_3) / 2

    has the mean s^2 (1 / h_1 h_2 + 1 / h_2 h_3) / 2, whatever a straight drift adds. Noise whose correlation falls as r^k is
    seen as s^2 (1 - r^k)^3 between members that are k apart: the largest of the three and the first tell s^2 and r. Of three
    members there is one pair of differences: their opposition alone is a lower bound. Two members tell nothing.

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
    root = (max(0.0, found[1]) / found[apart]) ** (1 / 3)  # (1 - r) / (1 - r^k), where r^k is between members k apart
    r = 1 / max(root, 1e-3) - 1  # = r + ... + r^(k-1)
    if apart == 3:
        r = (math.sqrt(1 + 4 * r) - 1) / 2
    r = min(MOST_CORRELATED, r) if apart > 1 else 0.0
    return Noise(found[apart] / (1 - r**apart) ** 3, r)


def excess(gram: np.ndarray, x: np.ndarray, apart: int) -> float:
    """By how much differences of members ``apart`` agree more with the next but one than with their neighbours."""
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
    """The squared distance of a merge of the newest members from where the newest one would be without its noise.

    It is at least what is left of the noise, ``c^T N c`` with its covariances N, of which the estimate could fall short by
    chance.
    """
    away = np.zeros(len(gram))
    away[-len(c) :] = c
    away[-1] -= 1
    ages = np.arange(len(c) - 1, -1, -1)
    covariances = noise.square * noise.correlation ** np.abs(ages[:, None] - ages[None, :])
    measured = float(away @ gram @ away) + 2 * float(c @ covariances[:, -1]) - noise.square
    return max(measured, float(c @ covariances @ c))


def cosines(squared: np.ndarray) -> list[float]:
    """Of successive deltas, from distances alone."""
    found = []
    for i in range(len(squared) - 2):
        a, b, both = squared[i, i + 1], squared[i + 1, i + 2], squared[i, i + 2]
        found.append(float((both - a - b) / (2 * np.sqrt(a * b))) if a > 0 and b > 0 else 0.0)
    return found


def explain(advice: Advice, names: list[str]) -> str:
    """The advice for people, with its reasons."""
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
            f"N_eff {advice.effective:.1f}, should lose {advice.gain:.0%} of the newest member's squared noise"
        )
    else:
        lines.append("merging should not help: the window drifts faster than its noise averages out; take the newest member")
    return "\n".join(lines)
