"""Random numbers that are a function of a key and a position: no state, no order.

A 32-bit position is hashed with both halves of a 64-bit key. The mixer is the two-round multiply-xorshift of Chris Wellons
(https://nullprogram.com/blog/2018/07/31/), whose bias is near the least possible for 32 bits.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

WORD = 1 << 32


def key_of(*parts: object) -> int:
    """64 bits of whatever names a stream of numbers, such as a seed, a tensor and an expert."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def words(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` int32, uniform over all 2^32 values: those at positions ``start`` to ``start + count`` of the stream."""
    high, low = divmod(start, WORD)
    assert low + count <= WORD, "a block does not cross a multiple of 2^32"
    first, second = (key + high * 0x9E3779B97F4A7C15) % WORD, (key >> 32) % WORD
    x = torch.arange(signed(low), signed(low) + count, dtype=torch.int64, device=device).to(torch.int32)
    return mix_(mix_(x.bitwise_xor_(signed(first))).add_(signed(second)))


def mix_(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, in place."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= signed(0x7FEB352D)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def chance(key: int, probability: float, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` bool, each true with the probability, which is taken to 32 bits."""
    bar = round(probability * WORD) - WORD // 2
    if bar >= WORD // 2:
        return torch.ones(count, dtype=torch.bool, device=device)
    return words(key, start, count, device) < bar


def uniform(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` float64 in [0, 1), a multiple of 2^-32; ``uniform < p`` is ``chance(p)`` for a p of 32 bits."""
    return (words(key, start, count, device).double() + WORD // 2) / WORD


def signed(value: int) -> int:
    """The int32 with the same bits."""
    return value - WORD if value >= WORD // 2 else value
