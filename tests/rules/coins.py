"""The numbers behind ``counter.chance``, digit by digit: its reference."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from distmerge.rules.random_masks import DIGITS, lower, words


def coins(key: int, start: int, count: int) -> Tensor:
    """``[count]`` float64 in [0, 1), multiples of 2^-(DIGITS + 32): a coin is true where it is below the probability."""
    first, skip = divmod(start, 64)
    total = lower(key, np.arange(start, start + count, dtype=np.int64)) * 0.5 ** (DIGITS + 32)
    for digit in range(1, DIGITS + 1):
        drawn = words(key, digit, first, (skip + count + 63) // 64)
        zeros = np.unpackbits(drawn.view(np.uint8), bitorder="little")[skip : skip + count]
        total += (1 - zeros) * 0.5**digit
    return torch.from_numpy(total)
