"""Tensors of a base model with a LoRA adapter applied, in float32; only the rows that are read are computed.

Compared with PEFT's merge_and_unload: https://github.com/huggingface/peft/tree/main/src/peft/tuners/lora
"""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch
from torch import Tensor

from distmerge.files.adapters import Change, Factors, Shift
from distmerge.files.header import Stored
from distmerge.files.sources import Maps, OnDisk, Source


class Sides(NamedTuple):
    """The factors of a change, oriented as the weight is stored: it adds ``scale left[e] @ right[e]`` to expert ``e``.

    Attributes:
        left: ``[experts, rows, r]``.
        right: ``[experts, r, columns]``.
        first: ``[rows, r]`` and ``[r, columns]``, whose product PiSSA and OLoRA subtracted from the base when they initialised
            the adapter; else None.
        magnitude: DoRA's norms ``[rows]``, or None.
    """

    left: Tensor
    right: Tensor
    first: tuple[Tensor, Tensor] | None
    magnitude: Tensor | None


def adapted(base: OnDisk, change: Change, maps: Maps) -> Source:
    """The base's tensor with the change applied."""
    return Shifted(base, change, maps) if isinstance(change, Shift) else Adapted(base, change, maps)


class Adapted:
    """A matrix, or a stack of one matrix per expert, with an adapter's low-rank change added to it."""

    dtype = torch.float32

    def __init__(self, base: OnDisk, factors: Factors, maps: Maps):
        self.shape, self.stored = base.shape, (*base.stored, *factors.stored)
        self._base, self._factors, self._maps = base, factors, maps
        self._lock = threading.Lock()
        self._sides: Sides | None = None

    @property
    def sides(self) -> Sides:
        with self._lock:
            if self._sides is None:
                self._sides = sides_of(self._factors, self._base, self._maps)
            return self._sides

    def read(self, start: int, stop: int) -> Tensor:
        sides = self.sides
        rows, columns = self.shape[-2:]
        first, last = start // columns, -(-stop // columns)
        parts = []
        for expert in range(first // rows, -(-last // rows)):
            at = expert * rows
            parts.append(self._rows(sides, expert, max(first - at, 0), min(last - at, rows)))
        return torch.cat(parts).view(-1)[start - first * columns : stop - first * columns]

    def _rows(self, sides: Sides, expert: int, low: int, high: int) -> Tensor:
        """Rows ``[low, high)`` of an expert's matrix, ``[high - low, columns]``."""
        rows, columns = self.shape[-2:]
        at = expert * rows
        found = (sides.left[expert, low:high] @ sides.right[expert]).mul_(self._factors.scale)
        found += self._base.read((at + low) * columns, (at + high) * columns).view(-1, columns)
        if sides.first is not None:
            found -= sides.first[0][low:high] @ sides.first[1]
        if sides.magnitude is not None:
            found *= (sides.magnitude[low:high] / torch.linalg.norm(found, dim=1)).unsqueeze(1)
        return found


class Shifted:
    """A bias with the adapter's bias, times the scale, added to it."""

    dtype = torch.float32

    def __init__(self, base: OnDisk, shift: Shift, maps: Maps):
        self.shape, self.stored = base.shape, (*base.stored, *shift.stored)
        self._base, self._by, self._scale = base, OnDisk(shift.by, maps), shift.scale

    def read(self, start: int, stop: int) -> Tensor:
        return (self._by.read(start, stop).float() * self._scale).add_(self._base.read(start, stop))


def sides_of(factors: Factors, base: OnDisk, maps: Maps) -> Sides:
    """Read an adapter's factors in float32 and orient them as the weight is stored."""
    a, b = matrix(factors.a, maps), matrix(factors.b, maps)
    right = a.view(factors.experts, -1, a.shape[1])  # [experts, r, columns]
    left = b.view(b.shape[0], -1, factors.experts).permute(2, 0, 1)  # PEFT: [rows, r, experts]
    if factors.transposed:
        left, right = right.transpose(1, 2), left.transpose(1, 2)
    magnitude = None if factors.magnitude is None else OnDisk(factors.magnitude, maps).read(0, b.shape[0]).float()
    first = first_value(factors, base) if factors.init else None
    return Sides(left.contiguous(), right.contiguous(), first, magnitude)


def first_value(factors: Factors, base: OnDisk) -> tuple[Tensor, Tensor]:
    """``[rows, r]`` and ``[r, columns]``: their product is what PiSSA or OLoRA subtracted from the base at initialisation."""
    rank = factors.a.shape[0]
    whole = base.read(0, base.stored[0].numel).view(base.shape).float()
    if factors.init == "olora":
        q, r = torch.linalg.qr(whole)
        return q[:, :rank] * factors.scale, r[:rank].contiguous()
    left, values, right = torch.linalg.svd(whole, full_matrices=False)
    # No scale here: PEFT divides the singular values by it for the factors, and multiplies by it again for the product.
    return left[:, :rank] * values[:rank], right[:rank].contiguous()


def matrix(stored: Stored, maps: Maps) -> Tensor:
    return OnDisk(stored, maps).read(0, stored.numel).view(stored.shape).float()
