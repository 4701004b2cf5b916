"""Random numbers that are a function of a key and a position: no state, no order.

A 32-bit position is hashed with both halves of a 64-bit key. The mixer is the two-round multiply-xorshift of Chris Wellons
(https://nullprogram.com/blog/2018/07/31/), whose bias is near the least possible for 32 bits.
"""

from __future__ import annotations

import functools
import hashlib

import torch
from torch import Tensor

WORD = 1 << 32
HALF = 1 << 31


def key_of(*parts: object) -> int:
    """64 bits of whatever names a stream of numbers, such as a seed, a tensor and an expert."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def words(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` int32, uniform over all 2^32 values: those at positions ``start`` to ``start + count`` of the stream."""
    high, low = divmod(start, WORD)
    assert low + count <= WORD, "a block does not cross a multiple of 2^32"
    first, second = (key + high * 0x9E3779B97F4A7C15) % WORD, (key >> 32) % WORD
    x = iota(1 << max(0, count - 1).bit_length(), str(device))[:count] + signed(low)
    return mix_(mix_(x.bitwise_xor_(signed(first))).add_(signed(second)))


@functools.lru_cache(maxsize=4)
def iota(count: int, device: str) -> Tensor:
    return torch.arange(count, dtype=torch.int32, device=device)


def mix_(x: Tensor) -> Tensor:
    """A bijection of 32-bit words, in place."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= signed(0x7FEB352D)
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= signed(0x846CA68B)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def draws(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` int32, uniform over [0, 2^31)."""
    return words(key, start, count, device).bitwise_right_shift_(1).add_(HALF // 2)


def chance(key: int, probability: float, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` int32, each all ones with the probability, which is taken to 31 bits, and else 0: a mask of bits."""
    if probability >= 1:
        return torch.full((count,), -1, dtype=torch.int32, device=device)
    # The sign of draws - probability 2^31, spread over all bits: faster than a comparison and a selection.
    return (
        words(key, start, count, device)
        .bitwise_right_shift_(1)
        .sub_(round(probability * HALF) - HALF // 2)
        .bitwise_right_shift_(31)
    )


def uniform(key: int, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` float64 in [0, 1), a multiple of 2^-31; ``uniform < p`` is ``chance(p)`` for a p of 31 bits."""
    return draws(key, start, count, device).double() / HALF


def signed(value: int) -> int:
    """The int32 with the same bits."""
    return value - WORD if value >= HALF else value
