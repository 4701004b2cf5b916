"""Which parameters a sparse merge takes: the same indices on every rank, computed and never sent or stored.

A round's indices are values of a permutation of ``range(n)`` that a small Feistel network computes, keyed by (seed, key):
O(k) work for k indices, and no state but the round's number.
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

    A Feistel network over pairs (left, right) in Z_a x Z_b with a b >= numel, which is a bijection whatever the hash; values
    past the end walk on along their cycle until they fall inside. (Black and Rogaway, "Ciphers with arbitrary finite
    domains", 2002.)
    """
    b = max(1, math.isqrt(numel))
    a = -(-numel // b)
    values = feistel(positions, a, b, seed, key)
    while (outside := (values >= numel).nonzero().view(-1)).numel():
        values[outside] = feistel(values[outside], a, b, seed, key)
    return values


def feistel(values: Tensor, a: int, b: int, seed: int, key: int) -> Tensor:
    left, right = values // b, values % b
    for number in range(0, ROUNDS, 2):
        left = (left + hashed(right, seed, key, number)) % a
        right = (right + hashed(left, seed, key, number + 1)) % b
    return left * b + right


def hashed(values: Tensor, seed: int, key: int, number: int) -> Tensor:
    """31 well-mixed bits of each value (the finaliser of MurmurHash3), the same on every device."""
    salt = (seed * 0x9E3779B1 + key * 0x85EBCA6B + number * 0xC2B2AE35 + 0x27D4EB2F) & 0xFFFFFFFF
    x = (values ^ salt) & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0xFFFFFFFF  # products wrap at 64 bits, which leaves the low 32 right
    return (x ^ (x >> 16)) >> 1
