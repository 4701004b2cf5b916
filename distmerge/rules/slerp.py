"""Spherical interpolation between two members, of whole tensors or of their rows or columns.

SLERP: Shoemake 1985, https://dl.acm.org/doi/10.1145/325334.325242. NuSLERP is mergekit's name for the variant that takes
weights and a base, and lets users choose whether tensors, rows or columns count as vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmerge.rules.protocol import Block, Measured, Rule, Tally, total_norm, wide
from distmerge.rules.torch_typed import vector_norm

NEARLY_PARALLEL = 0.9995


class Slerp(Rule):
    """``sin((1-t) w)/sin w a + sin(t w)/sin w b``, w the angle between the tensors a and b as flat vectors.

    Where they are nearly parallel, ``|cos w| > 0.9995``, it is the straight line ``(1-t) a + t b``.
    """

    passes = 2
    exact = False
    least = most = 2

    def __init__(self, t: float, dtype: torch.dtype = torch.float32):
        self.t, self.dtype = t, dtype

    def measure(self, step: int, block: Block, state: Any) -> Measured:
        a, b = (member.to(self.dtype) for member in block.members)
        if step == 0:
            return Measured(kept={"norms": torch.stack([vector_norm(a), vector_norm(b)])})
        return Measured(kept={"dot": ((a / state[0]) * (b / state[1])).sum()})

    def settle(self, step: int, tally: Tally, state: Any) -> Any:
        if step == 0:
            norms = total_norm(tally, "norms")
            return torch.where(norms > 1e-8, norms, 1.0).to(self.dtype)
        return interpolation(self.t, tally.total("dot").to(self.dtype))

    def merge(self, block: Block, state: Any) -> Tensor:
        a, b = (member.to(self.dtype) for member in block.members)
        return state[0] * a + state[1] * b


def interpolation(t: float, cosine: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of the two vectors at ``t`` between them, given the cosine of their angle."""
    cosine = cosine.clamp(-1, 1)
    if abs(cosine) > NEARLY_PARALLEL:
        return cosine.new_tensor(1 - t), cosine.new_tensor(t)
    angle = torch.acos(cosine)
    return torch.sin((1 - t) * angle) / torch.sin(angle), torch.sin(t * angle) / torch.sin(angle)


class Nuslerp(Rule):
    """Slerp of two members, or of their task vectors where there is a base, with ``t`` the second's share of the weight.

    Args:
        columns: None for the whole tensor as one vector; else the length of a row.
        by_row: each row is a vector; otherwise each column is.
    """

    least = most = 2

    def __init__(self, t: float, columns: int | None, by_row: bool, dtype: torch.dtype):
        self.t, self.columns, self.by_row, self.dtype = t, columns, by_row, dtype
        self.unit = columns or 1
        self.passes = 0 if columns and by_row else 2
        self.exact = self.passes == 0

    def vectors(self, block: Block) -> tuple[Tensor | None, Tensor, Tensor]:
        a, b = (member.to(self.dtype) for member in block.members)
        base = block.base.to(self.dtype) if block.base is not None else None
        if base is not None:
            a, b = a - base, b - base
        return (base, a, b) if self.columns is None else (base, a.view(-1, self.columns), b.view(-1, self.columns))

    @property
    def dim(self) -> int:
        """The dimension along which the vectors lie in what ``vectors`` returns."""
        return -1 if self.columns is None or self.by_row else 0

    def norms(self, a: Tensor, b: Tensor) -> Tensor:
        """``[2, ...]``: the norms of this block's part of each vector."""
        return torch.stack([vector_norm(x, dim=self.dim, keepdim=True, dtype=wide(self.dtype)) for x in (a, b)])

    def dots(self, a: Tensor, b: Tensor, norms: Tensor) -> Tensor:
        return ((a / norms[0]) * (b / norms[1])).sum(self.dim, keepdim=True, dtype=wide(self.dtype))

    def measure(self, step: int, block: Block, state: Any) -> Measured:
        _, a, b = self.vectors(block)
        return Measured(kept={"norms": self.norms(a, b)} if step == 0 else {"dots": self.dots(a, b, state)})

    def settle(self, step: int, tally: Tally, state: Any) -> Any:
        if step == 0:
            return self.clamped(total_norm(tally, "norms"))
        return self.shares(tally.total("dots"))

    def clamped(self, norms: Tensor) -> Tensor:
        return norms.to(self.dtype).clamp(min=1e-7)

    def shares(self, dots: Tensor) -> tuple[Tensor, ...]:
        """The factors of the two vectors, what their sum is divided by, and where a straight line is taken instead."""
        cosine = dots.to(self.dtype).clamp(-1, 1)
        straight = (1 - cosine.square()) <= 1e-16
        angle = torch.acos(torch.where(straight, 0, cosine))
        return torch.sin((1 - self.t) * angle), torch.sin(self.t * angle), torch.sin(angle), straight

    def merge(self, block: Block, state: Any) -> Tensor:
        base, a, b = self.vectors(block)
        if self.passes == 0:
            state = self.shares(self.dots(a, b, self.clamped(self.norms(a, b))))
        first, second, sine, straight = state
        curved = (first * a + second * b) / sine
        merged = torch.where(straight, (1 - self.t) * a + self.t * b, curved).view(-1)
        return merged if base is None else base + merged
