"""Random numbers that are a function of a key and a position, so that they need no state and can be drawn in any order.

Their bits come from PCG64DXSM (Melissa O'Neill's, in numpy, whose streams do not change between versions), which can be set to
any position of its stream. A number has 48 bits. The lower 32 are a hash of the position, the two-round multiply-xorshift of
Chris Wellons (https://nullprogram.com/blog/2018/07/31/). The hash costs far more, and is computed only where the upper bits
equal those of the threshold. Coins that all have the same chance take one bit for each digit of the chance, up to 12; again
the hash decides the few that are left.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distmerge.rules.torch_typed import from_numpy

LOW = 32
WORD = 1 << LOW
ONE = 1 << 48
"""How many different numbers there are: the probability 1, counted in numbers."""

DIGITS = 12
"""How many binary digits of a coin's number are drawn. One coin in 4,096 is still undecided then and needs the lower 32."""


def key_of(*parts: object) -> int:
    """A 64-bit hash of whatever names a stream of numbers, such as a seed, a tensor and an expert."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def words(key: int, stream: int, start: int, count: int) -> NDArray[np.uint64]:
    """``count`` words from ``start`` on of one of the key's streams, in the memory's order of a little-endian machine."""
    source = np.random.PCG64DXSM(np.random.SeedSequence(key, spawn_key=(stream,)))
    source.advance(start)
    return source.random_raw(count).astype("<u8", copy=False)


def upper(key: int, start: int, count: int) -> NDArray[np.uint16]:
    """``[count]``: the upper 16 bits of the numbers at ``start`` to ``start + count``."""
    first, skip = divmod(start, 4)
    return words(key, 0, first, -(-(skip + count) // 4)).view("<u2")[skip : skip + count]


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
    """The int64 threshold for which the share of numbers below it is the probability."""
    return (probability.double() * ONE).ceil().to(torch.int64)


def below(key: int, start: int, bars: Tensor) -> Tensor:
    """``[n]`` bool: which of the numbers from ``start`` on lie below their own threshold in ``bars [n]``, int64 in [0, ONE]."""
    own = bars.cpu().numpy()
    drawn, high = upper(key, start, len(own)), (own >> LOW).astype(np.int32)
    found = drawn < high
    close = np.flatnonzero(drawn == high)
    found[close] = lower(key, close + start) < (own[close] & (WORD - 1)).astype(np.uint64)
    return from_numpy(found).to(bars.device)


def chance(key: int, probability: float, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """``[count]`` bool from ``start`` on, each true with the probability, which is rounded to DIGITS + 32 binary digits.

    64 coins are flipped at once. A coin has a number, one digit from each of the key's streams and then the lower bits, and is
    true where it is below the probability. From the last digit upwards: where the probability has a 1, a 0 of the number wins;
    where it has a 0, a 1 loses; else the lower digits decide.

    Example: a chance of 0.625 is 0.101 in binary. A number 0.abc is below it if a = 0, or else if b = 0 and c = 0. Let the
    words A, B and C have a set bit for each of 64 coins whose digit a, b or c is 0. From the last digit upwards that is
    ``won = C``, ``won &= B``, ``won |= A``: three operations for 64 coins, of which 1/2 + 1/2 * 1/4 = 0.625 win. No digit
    after the last 1 of the chance matters, so none is drawn.
    """
    share, (first, skip) = round(probability * (WORD << DIGITS)), divmod(start, 64)
    upper_share, rest = divmod(share, WORD)
    size = -(-(skip + count) // 64)
    won = np.full(size, EVERY if upper_share >> DIGITS else 0, "<u8")
    might = np.full(size, EVERY, "<u8") if rest else None  # won, if the lower digits win
    for digit in range(DIGITS if rest else last_one(upper_share), 0, -1):
        zeros = words(key, digit, first, size)  # a set bit is a 0 of the number
        decide = np.bitwise_or if upper_share >> (DIGITS - digit) & 1 else np.bitwise_and
        for flips in (won,) if might is None else (won, might):
            decide(flips, zeros, out=flips)
    found = bits_of(won)[skip : skip + count].view(np.bool_)
    if might is not None:
        undecided = np.bitwise_xor(won, might)
        some = np.flatnonzero(undecided)
        which, bit = np.nonzero(bits_of(undecided[some]).reshape(-1, 64))
        close = some[which] * 64 + bit - skip
        close = close[(close >= 0) & (close < count)]
        found[close] = lower(key, close + start) < rest
    return from_numpy(found).to(device)


EVERY = (1 << 64) - 1


def bits_of(packed: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """``[64 n]``: 0 or 1, from the lowest bit of each word on."""
    return np.unpackbits(packed.view(np.uint8), bitorder="little")


def last_one(share: int) -> int:
    """The place of the last digit that is 1, from 1 for a half to DIGITS; 0 if there is none."""
    return DIGITS + 1 - (share & -share).bit_length() if share % (1 << DIGITS) else 0


def uniform(key: int, start: int, count: int) -> Tensor:
    """``[count]`` float64 in [0, 1), multiples of 2^-48: ``uniform < p`` is ``below(bar(p))``."""
    numbers = lower(key, np.arange(start, start + count, dtype=np.int64))
    return from_numpy((upper(key, start, count) * float(WORD) + numbers) / ONE)
