"""Fast encoding and decoding of the wire's formats: into reused buffers, in pieces that fit a cache, or in compiled code.

:mod:`distmerge.workers.wire` defines the bytes. This module produces the same bytes without temporaries of the message's size.
On a CPU it uses codec.c if distmerge was installed with a C compiler; otherwise it applies the plain functions piece by piece.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator
from ctypes import c_float, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from distmerge.rules import compiled
from distmerge.rules.compiled import at
from distmerge.workers.wire import BLOCK, Wire

FORM = 1
"""Version of the interface to codec.c; it is raised in both files whenever the C functions change."""

PIECE = 1 << 16
"""Elements that the plain functions process at a time on a CPU, so that their temporaries stay in the cache."""


class Row:
    """One row of a message: memory for ``numel`` values in a wire's format. Any range of blocks can be written or read.

    Args:
        memory: ``[wire.size_bytes(numel)]`` uint8, contiguous. The scales of all blocks come first, then the values.
        numel: a multiple of 64.
    """

    def __init__(self, wire: Wire, memory: Tensor, numel: int):
        assert numel % BLOCK == 0 and memory.numel() == wire.size_bytes(numel)
        self.wire, self.numel, self.memory = wire, numel, memory
        self.head = numel // BLOCK * 4 if wire.levels else 0
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(wire.name)

    def encode(self, values: Tensor, residual: Tensor | None = None) -> None:
        """Write ``values [n]``, where n is at most ``numel``; the rest of the row is filled with 0.

        Args:
            residual: ``[numel]``, the rounding errors of earlier messages. They are added to the values, and replaced by the
                errors of this message.
        """
        whole = len(values) // BLOCK * BLOCK
        self._encode(values[:whole], 0, residual)
        if whole < self.numel:
            rest = values.new_zeros(self.numel - whole)
            rest[: len(values) - whole] = values[whole:]
            self._encode(rest, whole, residual)

    def decode(self, out: Tensor) -> None:
        """Read the first values into ``out [n]``, n at most ``numel``."""
        whole = len(out) // BLOCK * BLOCK
        self._decode(out[:whole], 0, None)
        if whole < len(out):
            rest = out.new_empty(BLOCK)
            self._decode(rest, whole, None)
            out[whole:] = rest[: len(out) - whole]

    def add_to(self, out: Tensor, weight: float) -> None:
        """``out [numel] += weight * values``."""
        self._decode(out, 0, weight)

    def _encode(self, values: Tensor, first: int, residual: Tensor | None) -> None:
        if len(values) == 0:
            return
        fast = library() if values.device.type == "cpu" and self.wire.levels else None
        if fast is not None:
            lost = None if residual is None else at(residual[first : first + len(values)])
            function = fast.codec_encode_8 if self.wire.name == "int8" else fast.codec_encode_4
            function(len(values) // BLOCK, at(values), lost, *map(at, self._places(first, len(values))))
            return
        if self.dtype is not None and residual is None:
            self._places(first, len(values))[1].view(self.dtype).copy_(values)
            return
        for start, stop in pieces(values):
            piece = values[start:stop]
            if residual is not None:
                piece = piece + residual[first + start : first + stop]
            encoded = self.wire.encode(piece)
            if residual is not None:
                lost = residual[first + start : first + stop]
                torch.sub(piece, self.wire.decode(encoded, len(piece)), out=lost)
            head = len(piece) // BLOCK * 4 if self.wire.levels else 0
            scales, body = self._places(first + start, len(piece))
            scales.copy_(encoded[:head])
            body.copy_(encoded[head:])

    def _decode(self, out: Tensor, first: int, weight: float | None) -> None:
        if len(out) == 0:
            return
        fast = library() if out.device.type == "cpu" and self.wire.levels else None
        if fast is not None:
            function = fast.codec_decode_8 if self.wire.name == "int8" else fast.codec_decode_4
            adds = weight is not None
            function(len(out) // BLOCK, *map(at, self._places(first, len(out))), adds, weight if adds else 1.0, at(out))
            return
        if self.dtype is not None and weight is None:
            out.copy_(self._places(first, len(out))[1].view(self.dtype))
            return
        for start, stop in pieces(out):
            values = self.wire.decode(torch.cat(self._places(first + start, stop - start)), stop - start)
            if weight is None:
                out[start:stop] = values
            else:
                out[start:stop].add_(values.mul_(weight))

    def _places(self, first: int, numel: int) -> tuple[Tensor, Tensor]:
        """The parts of the memory that hold the scales and the values of a range of blocks."""
        body_bytes = (self.memory.numel() - self.head) // (self.numel // BLOCK)
        start, stop = first // BLOCK, (first + numel) // BLOCK
        scales = self.memory[start * 4 : stop * 4] if self.head else self.memory[:0]
        return scales, self.memory[self.head + start * body_bytes : self.head + stop * body_bytes]


def pieces(values: Tensor) -> Iterator[tuple[int, int]]:
    """Start and stop of ranges that fit a CPU's cache; on a GPU one range covers everything."""
    size = PIECE if values.device.type == "cpu" else max(1, len(values))
    for start in range(0, len(values), size):
        yield start, min(start + size, len(values))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled codec.c; None if it was not compiled."""
    encode = (c_int64, c_void_p, c_void_p, c_void_p, c_void_p)
    decode = (c_int64, c_void_p, c_void_p, c_int, c_float, c_void_p)
    functions: dict[str, Iterable[Any]] = {
        "codec_encode_8": encode,
        "codec_encode_4": encode,
        "codec_decode_8": decode,
        "codec_decode_4": decode,
    }
    return compiled.library("distmerge.workers._codec", "codec_form", FORM, functions)
