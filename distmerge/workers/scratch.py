"""Buffers that are kept between merges: fresh memory costs as much as a copy of what is written into it."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Scratch:
    """Buffers of one device, by their size and dtype. As many are kept as were ever in use at once."""

    def __init__(self, device: torch.device):
        self.device = device
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """``[numel]``, with anything in it."""
        free = self._free[numel, dtype]
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=self.device)

    def give(self, *buffers: Tensor) -> None:
        """Take buffers back, of any shape; their owner no longer uses them."""
        for buffer in buffers:
            self._free[buffer.numel(), buffer.dtype].append(buffer.view(-1))
