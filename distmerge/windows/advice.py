"""The gate: whether merging a window should help, which part of it and by which curve, from one Gram matrix.

Blocks are taken as a drift plus noise of their own: E|theta_i - theta_j|^2 = 2 s^2 + v^2 (x_i - x_j)^2, fitted by least
squares to the measured distances. A merge with weights c then lies v^2 (x_last - sum c x)^2 behind the newest block and holds
s^2 sum c^2 of noise; the newest block alone holds s^2. The advice is the curve and length with the least sum. Plain
distances count all directions alike, though the drift's are mostly flat and the noise's steep, so they lean to short windows;
weighed by the curvature's diagonal they are what a quadratic loss would see. Either way it is a reason to look, no verdict.

Source of drift against noise: PMA, https://arxiv.org/abs/2505.12082.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    noise, drift: s^2, and v^2 over the whole window.
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
    noise, drift = fit(squared, x)
    best = ("linear", 1, noise)
    for count in range(2, n + 1):
        shares = token_shares(starts[-count:], end)
        for curve in CURVES:
            cost = expected(weights(curve, shares.tolist()), x[-count:], noise, drift)
            if cost < best[2]:
                best = (curve, count, cost)
    curve, count, cost = best
    c = weights(curve, token_shares(starts[-count:], end).tolist())
    return Advice(
        merge=count > 1,
        curve=curve,
        count=count,
        gain=1 - cost / noise if noise > 0 else 0.0,
        ratio=float(squared[0, -1] / steps.sum()) if steps.sum() > 0 else 0.0,
        cosines=cosines(squared),
        noise=noise,
        drift=drift,
        effective=effective_count(c),
    )


def fit(squared: np.ndarray, x: np.ndarray) -> tuple[float, float]:
    """s^2 and v^2, neither negative, by least squares over all pairs."""
    upper = np.triu_indices(len(x), 1)
    apart = (x[:, None] - x[None, :])[upper] ** 2
    design = np.stack([np.full_like(apart, 2.0), apart], axis=1)
    measured = squared[upper]
    noise, drift = np.linalg.lstsq(design, measured, rcond=None)[0]
    if drift < 0:
        noise, drift = measured.mean() / 2, 0.0
    if noise < 0:
        noise, drift = 0.0, float((measured * apart).sum() / max(np.square(apart).sum(), 1e-300))
    return float(noise), float(drift)


def expected(c: np.ndarray, x: np.ndarray, noise: float, drift: float) -> float:
    """The squared distance of a merge from where the newest block would be without its noise."""
    behind = float(x[-1] - c @ x)
    return drift * behind**2 + noise * float(np.square(c).sum())


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
