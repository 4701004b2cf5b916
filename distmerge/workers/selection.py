"""Which parameters a sparse merge takes. Every rank computes the same indices, so they are never sent or stored.

A round's indices are values of a permutation of ``range(n)``, which a small Feistel network with the key (seed, key) computes.
The work for k indices is O(k), and there is no state except the round's number.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Selector = Literal["random", "shuffled", "partitioned"]
ROUNDS = 6


def select(
    selector: Selector, numel: int, fraction: float, round: int, seed: int, device: torch.device | str = "cpu"
) -> Tensor:
    """The indices of a round.

    Args:
        selector: random: ``k = max(1, round(fraction n))`` drawn anew each round, so r rounds cover ``1 - (1 - p)^r``.
            shuffled: one fixed permutation cut into chunks of k. partitioned: a permutation for each cycle of
            ``ceil(n / k)`` rounds, which covers everything once.
        round: counted from 0.

    Returns:
        ``[k]`` int64, distinct; the last chunk of a cycle has what is left.
    """
    size = min(numel, max(1, math.floor(fraction * numel + 0.5)))
    chunks = -(-numel // size)
    cycle, chunk = divmod(round, chunks)
    key, first = {"random": (round, 0), "shuffled": (0, chunk * size), "partitioned": (cycle, chunk * size)}[selector]
    positions = torch.arange(first, min(first + size, numel), dtype=torch.int64, device=device)
    return permute(positions, numel, seed, key)


def permute(positions: Tensor, numel: int, seed: int, key: int) -> Tensor:
    """A pseudo-random permutation of ``range(numel)`` at ``positions``.

    A Feistel network over as many bits as ``numel - 1`` has, which is a bijection for any hash. Values past the end
    are mapped again along their cycle until they fall inside, which takes less than one more turn on average. (Black and
    Rogaway, "Ciphers with arbitrary finite domains", 2002.)
    """
    bits = max(2, (numel - 1).bit_length())
    values = feistel(positions, bits, seed, key)
    while (outside := (values >= numel).nonzero().view(-1)).numel():
        values[outside] = feistel(values[outside], bits, seed, key)
    return values


def feistel(values: Tensor, bits: int, seed: int, key: int) -> Tensor:
    """Change two halves of at most 31 bits in turn. They are int32, for which all operations are vectorised."""
    low = bits // 2
    right_mask, left_mask = (1 << low) - 1, (1 << (bits - low)) - 1
    left, right = (values >> low).int(), (values & right_mask).int()
    for number in range(0, ROUNDS, 2):
        left ^= hashed(right, seed, key, number).bitwise_and_(left_mask)
        right ^= hashed(left, seed, key, number + 1).bitwise_and_(right_mask)
    return (left.long() << low).bitwise_or_(right)


def hashed(values: Tensor, seed: int, key: int, number: int) -> Tensor:
    """32 well-mixed bits of each int32 value, the same on every device, since products wrap (lowbias32 of Chris Wellons)."""
    x = values ^ signed(seed * 0x9E3779B1 + key * 0x85EBCA6B + number * 0xC2B2AE35 + 0x27D4EB2F)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= (x >> shift).bitwise_and_(
            (1 << (32 - shift)) - 1
        )  # >> extends the sign, so those bits are cleared for a logical shift
        x *= signed(factor)
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def signed(word: int) -> int:
    """The low 32 bits of ``word`` as an int32."""
    return (word + 0x80000000 & 0xFFFFFFFF) - 0x80000000
