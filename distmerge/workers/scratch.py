"""Buffers that are reused between merges, since fresh memory costs as much as a copy of what is written into it."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor


class Scratch:
    """A pool of buffers on one device, by size and dtype. It keeps as many as were ever in use at the same time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._free: dict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)

    def take(self, numel: int, dtype: torch.dtype) -> Tensor:
        """A buffer ``[numel]`` with undefined contents."""
        free = self._free[numel, dtype]
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=self.device)

    def give(self, *buffers: Tensor) -> None:
        """Return buffers of any shape to the pool; the caller must not use them any more."""
        for buffer in buffers:
            self._free[buffer.numel(), buffer.dtype].append(buffer.view(-1))
