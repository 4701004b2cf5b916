"""From the arithmetic's dtype to the stored one: to the nearest, or stochastically."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distmerge.rules.random_masks import key_of, upper


class Rounding:
    """To the nearest value of the dtype; with a ``seed``, up or down with the odds that make the mean exact.

    Stochastic rounding keeps in the mean what nearest rounding loses of small deltas. It is for bfloat16, whose bits are
    the upper half of float32's; its random bits are a function of the seed, the tensor and the offset.
    """

    def __init__(self, seed: int | None = None):
        self.seed = seed

    def to(self, dtype: torch.dtype, values: Tensor, name: str, start: int) -> Tensor:
        """``values [n]`` of the tensor ``name`` from offset ``start`` on, rounded."""
        if self.seed is None or dtype != torch.bfloat16 or values.dtype != torch.float32:
            return values.to(dtype)
        drawn = upper(key_of("rounding", self.seed, name), start, values.numel())
        noise = torch.from_numpy(drawn.astype(np.int32)).to(values.device)
        bits = values.view(torch.int32)
        # Exponent all ones is NaN or infinity: adding to it would change its kind.
        finite = (bits & 0x7F800000) != 0x7F800000
        raised = torch.where(finite, bits + noise, bits)
        return (raised & -0x10000).view(torch.float32).to(dtype)
