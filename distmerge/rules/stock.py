"""Model Stock: the members' mean is drawn back to the base, the further the larger the angles between task vectors are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmerge.rules.protocol import Block, Measured, Rule, Tally, deltas, total_norm, wide
from distmerge.rules.torch_typed import vector_norm

TINY = 1e-6


class ModelStock(Rule):
    """``t mean + (1 - t) base``, ``t = N cos / (1 + (N - 1) cos)``, cos the mean cosine between pairs of task vectors.

    Args:
        columns: the length of a row for one cosine per row; None for one cosine per tensor.
        sums: the dtype in which a block's products are summed; float64 where blocks may be cut at other places.
        floor: products of norms count as at least this (mergekit: 1e-6, which damps very small task vectors).

    Source: https://arxiv.org/abs/2403.19522. Where the denominator vanishes there is no estimate, and the base stays.
    """

    least = 2

    def __init__(self, members: int, columns: int | None, dtype: torch.dtype, floor: float, sums: torch.dtype | None = None):
        self.sums = sums or wide(dtype)
        self.members, self.columns, self.dtype, self.floor = members, columns, dtype, floor
        self.unit, self.passes, self.exact = columns or 1, 0 if columns else 1, columns is not None
        self.pairs = [(i, j) for i in range(members) for j in range(i + 1, members)]

    def products(self, block: Block) -> tuple[Tensor, Tensor]:
        """``[M, rows or 1]`` norms and ``[pairs, rows or 1]`` products of the task vectors, of each row where rows count."""
        delta = deltas(block, self.dtype)[1]
        rows = delta.view(len(delta), -1, self.columns) if self.columns else delta.unsqueeze(1)
        dots = [(rows[i] * rows[j]).sum(-1, dtype=self.sums) for i, j in self.pairs]
        return vector_norm(rows, dim=-1, dtype=self.sums), torch.stack(dots)

    def measure(self, step: int, block: Block, state: Any) -> Measured:
        norms, dots = self.products(block)
        return Measured(kept={"norms": norms, "dots": dots})

    def settle(self, step: int, tally: Tally, state: Any) -> Tensor:
        return self.ratio(total_norm(tally, "norms"), tally.total("dots"))

    def ratio(self, norm: Tensor, dots: Tensor) -> Tensor:
        """``[rows or 1, 1]``: t."""
        norm, dots = norm.to(self.dtype), dots.to(self.dtype)
        cosines = [
            (dot / (norm[i] * norm[j]).clamp(min=self.floor)).clamp(-1, 1) for dot, (i, j) in zip(dots, self.pairs, strict=True)
        ]
        cosine = torch.stack(cosines).mean(0).unsqueeze(-1)
        below = 1 + (self.members - 1) * cosine
        flat = below.abs() < TINY
        return torch.where(flat, torch.zeros_like(cosine), self.members * cosine / torch.where(flat, 1.0, below))

    def merge(self, block: Block, state: Any) -> Tensor:
        if self.columns:
            state = self.ratio(*self.products(block))
        shape = (-1, self.columns) if self.columns else (1, -1)
        mean = block.members[0].to(self.dtype)
        for member in block.members[1:]:
            mean = mean + member.to(self.dtype)
        merged = state * (mean / self.members).view(shape)
        if block.base is not None:
            merged = merged + (1 - state) * block.base.to(self.dtype).view(shape)
        return merged.view(-1)
