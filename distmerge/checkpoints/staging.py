"""Copies the state in memory, so that training can continue while the copy is written to disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Staging:
    """Copies nested state into CPU buffers that are reused for the next copy.

    Fresh memory would cost a page fault for every 4 KB, which takes several times as long as the copy itself. With page-locked
    memory a GPU copies all tensors without a wait after each.
    """

    def __init__(self, device: torch.device):
        self.pinned = device.type == "cuda"
        self.buffers: dict[tuple[Any, ...], Tensor] = {}

    def copy(self, state: Any) -> Any:
        """``state`` with every tensor copied. The copy is valid until the next call."""
        copied = self._copy(state, ())
        if self.pinned:
            torch.cuda.synchronize()
        return copied

    def _copy(self, value: Any, place: tuple[Any, ...]) -> Any:
        if isinstance(value, Tensor):
            return self._buffer(value, place).copy_(value.detach(), non_blocking=self.pinned)
        if isinstance(value, dict):
            return {key: self._copy(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, (*place, index)) for index, item in enumerate(value))
        return value

    def _buffer(self, tensor: Tensor, place: tuple[Any, ...]) -> Tensor:
        buffer = self.buffers.get(place)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.pinned)
            self.buffers[place] = buffer
        return buffer
