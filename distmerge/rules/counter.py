"""Random numbers that are a function of a key and a position: no state, no order.

A number has 48 bits. The upper 16 come from SFC64 (Chris Doty-Humphrey's, in numpy, whose streams do not change between
versions), seeded anew for every PIECE of a stream: four a word, so they cost little more than the memory that they fill. The
lower 32 are a hash of the position, the two-round multiply-xorshift of Chris Wellons
(https://nullprogram.com/blog/2018/07/31/): ten times as dear, and wanted only where the upper ones equal a bar's.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

PIECE = 1 << 17
"""Numbers of a stream that one seed gives: enough to make seeding cheap, not many more than a block wants."""

LOW = 32
WORD = 1 << LOW
ONE = 1 << 48
"""The number of all numbers: a probability in their unit."""


def key_of(*parts: object) -> int:
    """64 bits of whatever names a stream of numbers, such as a seed, a tensor and an expert."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def upper(key: int, start: int, count: int) -> NDArray[np.uint16]:
    """``[count]``: the upper 16 bits of the numbers at ``start`` to ``start + count`` of the stream."""
    parts = []
    while count > 0:
        piece, first = divmod(start, PIECE)
        last = min(first + count, PIECE)
        source = np.random.Generator(np.random.SFC64(np.random.SeedSequence(key, spawn_key=(piece,))))
        words = source.integers(0, 1 << 64, -(-last // 4), dtype=np.uint64)
        parts.append(words.astype("<u8", copy=False).view("<u2")[first:last])
        start, count = start + last - first, count - last + first
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.uint16), *parts])


def lower(key: int, positions: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The lower 32 bits of the numbers at ``positions``."""
    at = positions.astype(np.uint64)
    mask, golden = np.uint64(WORD - 1), np.uint64(0x9E3779B97F4A7C15)
    x = mix((at & mask) ^ ((np.uint64(key) + (at >> np.uint64(LOW)) * golden) & mask))
    return mix((x + np.uint64(key >> LOW)) & mask)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 32-bit words."""
    mask = np.uint64(WORD - 1)
    x = x ^ (x >> np.uint64(16))
    x = (x * np.uint64(0x7FEB352D)) & mask
    x = x ^ (x >> np.uint64(15))
    x = (x * np.uint64(0x846CA68B)) & mask
    return x ^ (x >> np.uint64(16))


def bar(probability: Tensor) -> Tensor:
    """int64: the numbers below it are the probability's share of all."""
    return (probability.double() * ONE).ceil().to(torch.int64)


def below(key: int, start: int, bars: Tensor) -> Tensor:
    """``[n]`` bool: which numbers of the stream from ``start`` on lie below their own of ``bars [n]``, int64 in [0, ONE]."""
    return torch.from_numpy(under(key, start, bars.numel(), bars.cpu().numpy())).to(bars.device)


def chance(key: int, probability: float, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` bool, each true with the probability, which is taken to 48 bits: ``below`` one bar for all, faster."""
    return torch.from_numpy(under(key, start, count, np.asarray(math.ceil(probability * ONE)))).to(device)


def under(key: int, start: int, count: int, bars: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``[count]``: which numbers lie below ``bars``, one for all or ``[count]``."""
    drawn, high, rest = upper(key, start, count), bars >> LOW, (bars & (WORD - 1)).astype(np.uint64)
    high = high.astype(np.int32 if high.ndim or high >= 1 << 16 else np.uint16)  # comparing its own type is fastest
    found = drawn < high
    if rest.any():  # the lower bits decide where the upper ones are equal
        close = np.flatnonzero(drawn == high)
        found[close] = lower(key, close + start) < np.broadcast_to(rest, drawn.shape)[close]
    return found


def uniform(key: int, start: int, count: int) -> Tensor:
    """``[count]`` float64 in [0, 1), multiples of 2^-48: ``uniform < p`` is ``chance(p)``."""
    numbers = lower(key, np.arange(start, start + count, dtype=np.int64))
    return torch.from_numpy((upper(key, start, count) * float(WORD) + numbers) / ONE)
