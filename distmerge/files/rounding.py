"""Rounds merged values from the arithmetic's dtype to the stored one: to nearest, or stochastically."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distmerge.rules.random_masks import key_of, upper


class Rounding:
    """Rounds to the nearest value of a dtype; with a ``seed``, stochastically, so that the expected value is exact.

    Nearest rounding drops deltas smaller than half a unit in the last place; stochastic rounding keeps them on average. It is
    used only from float32 to bfloat16, whose bits are the upper half of float32's: a random number below 2^16 is added to the
    bits, and the lower half is cut off. The random numbers are a function of the seed, the tensor's name and the offset.
    """

    def __init__(self, seed: int | None = None):
        self.seed = seed

    def to(self, dtype: torch.dtype, values: Tensor, name: str, start: int) -> Tensor:
        """``values [n]``, which are the elements of the tensor ``name`` from offset ``start`` on, in ``dtype``."""
        if self.seed is None or dtype != torch.bfloat16 or values.dtype != torch.float32:
            return values.to(dtype)
        drawn = upper(key_of("rounding", self.seed, name), start, values.numel())
        noise = torch.from_numpy(drawn.astype(np.int32)).to(values.device)
        bits = values.view(torch.int32)
        # An exponent of all ones is NaN or infinity; an addition could turn one into the other.
        finite = (bits & 0x7F800000) != 0x7F800000
        raised = torch.where(finite, bits + noise, bits)
        return (raised & -0x10000).view(torch.float32).to(dtype)
