"""Radial-directional averaging (Decoupled DiLoCo, https://arxiv.org/abs/2604.21428).

Deltas of workers are nearly orthogonal, so their mean shrinks as 1/sqrt(M). Here length and direction are averaged apart,
for each tensor: ``d = (sum w|v| / sum w) * phi(sum w phi(v) / sum w)`` with ``phi(v) = v / |v|`` and ``phi(0) = 0``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distmerge.rules.mean import Total, weighted_mean, weighted_sum
from distmerge.rules.protocol import Block, Measured, Rule, Tally, deltas, onto, total_norm

DEGENERATE = 1e-6
"""A mean direction shorter than this has none: the members cancel out."""

PIECE = 4096
"""Elements whose squares are added up in single precision."""


class Radial(Rule):
    """The radial-directional mean of one tensor's deltas.

    The first pass measures each member's norm; the second the norm of the mean direction, from which follows what each member
    is multiplied by. Where the mean direction is degenerate that is its share of the weight: the plain mean.
    """

    passes = 2
    exact = False

    def __init__(self, weights: list[float], dtype: torch.dtype = torch.float32):
        self.weights, self.dtype = torch.tensor(weights, dtype=torch.float64), dtype

    def measure(self, step: int, block: Block, state: Any) -> Measured:
        _, rows = self.rows(block)
        if step == 0:
            return Measured(kept={"norms": torch.stack([norm(row) for row in rows])})
        return Measured(kept={"norm": norm(weighted_sum(rows, state[0].to(self.dtype)))})

    def settle(self, step: int, tally: Tally, state: Any) -> Any:
        share = self.weights / self.weights.sum()
        if step == 0:
            norms = total_norm(tally, "norms")
            return torch.where(norms > 0, share / torch.where(norms > 0, norms, 1), norms), share @ norms
        towards, length = state
        found = total_norm(tally, "norm")
        return share if bool(found < DEGENERATE) else towards * (length / found)

    def merge(self, block: Block, state: Any) -> Tensor:
        base, rows = self.rows(block)
        return onto(base, weighted_sum(rows, state.to(self.dtype)))

    def rows(self, block: Block) -> tuple[Tensor | None, list[Tensor]]:
        """The base and the deltas ``[n]``, which are only read."""
        if block.base is None:
            return None, [member.to(self.dtype) for member in block.members]
        base, delta = deltas(block, self.dtype)
        return base, list(delta)


def norm(x: Tensor) -> Tensor:
    """The norm of ``x [n]``, float64; summed in its own dtype over short pieces only."""
    whole = len(x) - len(x) % PIECE
    pieces = [torch.linalg.vector_norm(x[:whole].view(-1, PIECE), dim=1), torch.linalg.vector_norm(x[whole:]).view(1)]
    return torch.linalg.vector_norm(torch.cat(pieces).double())


def radial_mean(
    delta: Tensor,
    weight: Tensor,
    total: Total,
    segments: Sequence[slice],
    plain: Sequence[bool],
    over_shards: Callable[[Tensor], object] = lambda squares: None,
) -> Tensor:
    """The radial-directional average of the members' deltas.

    Args:
        delta: ``[M, n]``, the members here.
        weight: ``[M, 1]``.
        total: the sum over all members.
        segments: where each tensor lies in n.
        plain: for each tensor, whether to take its plain mean (embeddings).
        over_shards: completes squared norms over this process's part of the tensors, in place.

    Returns:
        ``[n]``. A tensor whose mean direction is degenerate takes its plain mean, by a second sum.
    """
    members, count = delta.shape[0], len(segments)
    squares = torch.stack([delta[:, part].double().square().sum(1) for part in segments], dim=1)
    over_shards(squares)
    norms = squares.sqrt().to(delta.dtype)
    unit = delta.clone()
    for index, part in enumerate(segments):
        if not plain[index]:
            unit[:, part] /= torch.where(norms[:, index] > 0, norms[:, index], 1).view(members, 1)
    summed = total(torch.cat([unit * weight, norms * weight, weight], dim=1))
    directions, lengths, weights = summed[: -count - 1], summed[-count - 1 : -1], summed[-1]
    d = directions / weights
    squares = torch.stack([d[part].double().square().sum() for part in segments])
    over_shards(squares)
    found = squares.sqrt().to(delta.dtype)
    degenerate = [bool(found[i] < DEGENERATE and lengths[i] > 0) and not plain[i] for i in range(count)]
    for index, part in enumerate(segments):
        if not plain[index] and not degenerate[index]:
            d[part] *= lengths[index] / weights / torch.where(found[index] > 0, found[index], 1)
    again = [part for part, falls_back in zip(segments, degenerate, strict=True) if falls_back]
    if again:
        means = weighted_mean(torch.cat([delta[:, part] for part in again], dim=1), weight, total)
        for part, mean in zip(again, means.split([part.stop - part.start for part in again]), strict=True):
            d[part] = mean
    return d
