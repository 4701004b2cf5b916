"""Rules that average nothing: one returns its only member, the other requires all members to be equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmerge.rules.protocol import Block, Rule


class Same(Rule):
    """The rule of tensors that cannot be averaged, of integers or booleans: all members must be equal, and so is the result."""

    needs_base = True  # what it compares with is the base as it is

    def merge(self, block: Block, state: Any) -> Tensor:
        first = block.members[0]
        others = block.members[1:] if block.base is None else [*block.members[1:], block.base]
        if not all(torch.equal(first, other) for other in others):
            raise ValueError("differs between the inputs, and is no floating point number to be merged")
        return first


class Scaled(Rule):
    """mergekit's passthrough: the one member, multiplied by ``scale`` if it is given."""

    linear = True
    most = 1

    def __init__(self, scale: float | None, dtype: torch.dtype):
        self.scale, self.dtype = scale, dtype

    @property
    def coefficients(self) -> Tensor:
        return torch.tensor([1.0 if self.scale is None else self.scale], dtype=self.dtype)

    def merge(self, block: Block, state: Any) -> Tensor:
        (member,) = block.members
        return member if self.scale is None else member.to(self.dtype) * self.scale
