"""Radial-directional averaging (Decoupled DiLoCo, https://arxiv.org/abs/2604.21428).

Deltas of workers are nearly orthogonal, so their mean shrinks as 1/sqrt(M). Here length and direction are averaged apart,
for each tensor: ``d = (sum w|v| / sum w) * phi(sum w phi(v) / sum w)`` with ``phi(v) = v / |v|`` and ``phi(0) = 0``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmerge.rules.mean import weighted_sum
from distmerge.rules.protocol import Block, Measured, Rule, Tally, deltas, onto, total_norm
from distmerge.rules.torch_typed import vector_norm

DEGENERATE = 1e-6
"""If the mean direction is shorter than this, the members cancel out and there is no direction to follow."""

PIECE = 4096
"""How many elements' squares are added up in single precision before the sum goes on in float64."""


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
        """The base and the deltas ``[n]``. Callers only read them, so they may be the members themselves."""
        if block.base is None:
            return None, [member.to(self.dtype) for member in block.members]
        base, delta = deltas(block, self.dtype)
        return base, list(delta)


def norm(x: Tensor) -> Tensor:
    """The norm of ``x [n]`` in float64. Only short pieces are summed in the dtype of ``x``."""
    whole = len(x) - len(x) % PIECE
    pieces = [vector_norm(x[:whole].view(-1, PIECE), dim=1), vector_norm(x[whole:]).view(1)]
    return vector_norm(torch.cat(pieces).double())
