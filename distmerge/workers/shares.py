"""How a message is divided among its owners: which share of it each worker reduces."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distmerge.workers.wire import BLOCK

CUT = 1 << 16
"""Elements of a tensor's blocks across workers. Shares end where blocks end, so smaller blocks divide the message more evenly.
With 30M parameters and 8 workers a share is at most 2% larger than another."""

WIDE = 1 << 18
"""Elements of a block where nothing depends on how a tensor is cut: fewer calls, and still in a processor's cache."""

LEEWAY = 0.002
"""By what fraction of its size a share may be smaller or larger, so that it ends where a tensor ends."""


@dataclass(frozen=True)
class Piece:
    """A part of a tensor in a message.

    Attributes:
        name: the tensor's name.
        first: the offset of the part in the flattened tensor.
        start, stop: the range of the part in the message.
    """

    name: str
    first: int
    start: int
    stop: int

    def spans(self, unit: int, grain: int = CUT) -> list[tuple[int, int]]:
        """Start and stop, in the message, of the blocks that the part is cut into, of about ``grain`` elements. They are the
        same blocks of the tensor wherever the part begins, except for the first and the last one."""
        size = max(1, grain // unit) * unit
        cuts = range(self.start - self.first % size + size, self.stop, size)
        bounds = [self.start, *cuts, self.stop]
        return [(a, b) for a, b in itertools.pairwise(bounds) if b > a]

    def within(self, start: int, stop: int) -> Piece | None:
        """The part of this piece within a range of the message; None if there is none."""
        low, high = max(start, self.start), min(stop, self.stop)
        return Piece(self.name, self.first + low - self.start, low, high) if low < high else None


@dataclass(frozen=True)
class Shares:
    """Each worker's share of a message ``[n]``.

    Attributes:
        bounds: start and stop in the message, one pair for each worker, end to end.
        rows: how many elements each worker's row has on a quantised wire: multiples of the wire's block.
    """

    bounds: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]


def share_numel(numel: int, peers: int) -> int:
    """Elements of an equal share, a multiple of the wire's block."""
    return -(-numel // (peers * BLOCK)) * BLOCK


def equal_shares(numel: int, peers: int) -> Shares:
    """Shares of one size; the last ones may be shorter or empty. Any rule that works element by element can use them."""
    share = share_numel(numel, peers)
    bounds = tuple((min(numel, peer * share), min(numel, (peer + 1) * share)) for peer in range(peers))
    return Shares(bounds, (share,) * peers)


def aligned_shares(pieces: Sequence[Piece], numel: int, peers: int, unit: Callable[[str], int]) -> Shares:
    """Shares that end where tensors end if such a place is near enough, and otherwise where a tensor's block ends. Most whole
    tensors then have a single owner, which can measure them alone."""
    ends = sorted({piece.stop for piece in pieces})
    blocks = sorted({stop for piece in pieces for _, stop in piece.spans(unit(piece.name))})
    cuts = [0]
    for peer in range(1, peers):
        wanted = numel * peer / peers
        end = nearest(ends, wanted)
        cut = end if abs(end - wanted) <= LEEWAY * numel / peers else nearest(blocks, wanted)
        cuts.append(max(cut, cuts[-1]))
    bounds = tuple(zip(cuts, [*cuts[1:], numel], strict=True))
    return Shares(bounds, tuple(-(-(stop - start) // BLOCK) * BLOCK for start, stop in bounds))


def nearest(places: Sequence[int], wanted: float) -> int:
    return min(places, key=lambda place: abs(place - wanted), default=0)
