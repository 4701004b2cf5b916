"""Fragments of theta that merge in turn, and the buckets that their collectives carry.

Streaming DiLoCo (https://arxiv.org/abs/2501.18512) cuts a transformer into groups of blocks. ``strided`` deals the blocks
out in turn, so that each fragment has early and late ones; ``balanced`` always gives the next largest block to the smallest
fragment. The blocks of all lists are dealt out, one list after the other: those of an encoder, then those of a decoder. Other
parameters before the first block (embeddings) go to the first fragment, and the rest to the last. With balanced fragments, each
of those parameters is dealt out like a block. Alternatively, patterns of names assign parameters to fragments.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from distmerge.errors import UserError
from distmerge.theta import layers
from distmerge.theta.flat import FlatParameters, Slot, pieces


@dataclass(frozen=True)
class Bucket:
    """Parts of this rank's vector that travel in one message.

    Attributes:
        index: its place among all buckets of a merger.
        slices: where its elements lie in the vector.
        numel: how many there are.
    """

    index: int
    slices: tuple[slice, ...]
    numel: int

    def parts(self, like: Tensor) -> Iterator[tuple[slice, slice]]:
        """Pairs of (where in the vector, where in the message), small enough for a cache."""
        at = 0
        for whole in self.slices:
            for part in pieces(like, whole.start, whole.stop):
                yield part, slice(at, at + part.stop - part.start)
                at += part.stop - part.start


def cut_fragments(
    flat: FlatParameters, count: int, order: str, bucket_numel: int, patterns: tuple[str, ...] | None = None
) -> list[list[Bucket]]:
    """The buckets of each of ``count`` fragments of this rank's vector.

    Args:
        order: "strided" or "balanced"; ignored if there are patterns.
        bucket_numel: the largest number of elements in a bucket.
        patterns: one regular expression for each fragment, searched for in the names of the parameters.

    Raises:
        UserError: when there are fewer blocks than fragments, or a parameter does not match exactly one pattern.
    """
    if patterns:
        groups = by_patterns(flat.layout, patterns)
    else:
        groups = [list(flat.layout)] if count == 1 else assign(flat.layout, count, order)
    result: list[list[Bucket]] = []
    index = 0
    for slots in groups:
        cuts = list(cut(segments(slots, flat.start, flat.vector.numel()), bucket_numel))
        result.append([Bucket(index + i, part, sum(s.stop - s.start for s in part)) for i, part in enumerate(cuts)])
        index += len(cuts)
    return result


def assign(layout: tuple[Slot, ...], count: int, order: str) -> list[list[Slot]]:
    """The slots of each fragment, in the layout's order."""
    blocks = layers.numbered(slot.name for slot in layout)
    depth = len(set(blocks.values()))
    if count > depth:
        raise UserError(f"fragments must be <= the model's {depth} blocks, got {count}")
    if order == "strided":
        first = min((index for index, slot in enumerate(layout) if slot.name in blocks), default=0)
        chosen = [
            blocks[slot.name] % count if slot.name in blocks else 0 if index < first else count - 1
            for index, slot in enumerate(layout)
        ]
    elif order == "balanced":
        chosen = balance(layout, blocks, count)
    else:
        raise UserError(f'fragment_order must be "strided" or "balanced", got "{order}"')
    return grouped(layout, chosen, count)


def grouped(layout: tuple[Slot, ...], chosen: list[int], count: int) -> list[list[Slot]]:
    """The slots of each fragment, given the fragment of each slot."""
    return [[slot for slot, fragment in zip(layout, chosen, strict=True) if fragment == number] for number in range(count)]


def by_patterns(layout: tuple[Slot, ...], patterns: tuple[str, ...]) -> list[list[Slot]]:
    """The slots whose names match each pattern, in the layout's order.

    Raises:
        UserError: for a pattern that is no regular expression or matches nothing, and for a parameter that matches none or two.
    """
    compiled: list[re.Pattern[str]] = []
    for pattern in patterns:
        try:
            compiled.append(re.compile(pattern))
        except re.error as error:
            raise UserError(f"fragment_patterns must be regular expressions, got {pattern!r}: {error}") from None
    chosen: list[int] = []
    for slot in layout:
        matching = [number for number, pattern in enumerate(compiled) if pattern.search(slot.name)]
        if len(matching) != 1:
            found = " and ".join(repr(patterns[number]) for number in matching) or "none"
            raise UserError(f"parameter {slot.name} must match exactly one of fragment_patterns, it matches {found}")
        chosen += matching
    for number, pattern in enumerate(patterns):
        if number not in chosen:
            raise UserError(f"fragment_patterns: {pattern!r} matches no parameter")
    return grouped(layout, chosen, len(patterns))


def balance(layout: tuple[Slot, ...], blocks: dict[str, int], count: int) -> list[int]:
    """The fragment of each slot: units are assigned, largest first, to the fragment that is smallest so far."""
    unit = {slot.name: f"block {blocks[slot.name]}" if slot.name in blocks else slot.name for slot in layout}
    sizes: dict[str, int] = defaultdict(int)
    for slot in layout:
        sizes[unit[slot.name]] += math.prod(slot.shape)  # the same on all ranks of a worker, whatever each holds
    loads = [0] * count
    home: dict[str, int] = {}
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        home[name] = loads.index(min(loads))
        loads[home[name]] += sizes[name]
    return [home[unit[slot.name]] for slot in layout]


def segments(slots: list[Slot], start: int, length: int) -> Iterator[slice]:
    """Contiguous runs of the slots, in the coordinates of a vector that holds [start, start + length) of the layout."""
    run: slice | None = None
    for slot in slots:
        low, high = max(slot.offset, start) - start, min(slot.stop, start + length) - start
        if low >= high:
            continue
        if run is not None and run.stop == low:
            run = slice(run.start, high)
            continue
        if run is not None:
            yield run
        run = slice(low, high)
    if run is not None:
        yield run


def cut(runs: Iterator[slice], size: int) -> Iterator[tuple[slice, ...]]:
    """Group runs into messages of ``size`` elements each; only the last one may have fewer."""
    message: list[slice] = []
    room = size
    for run in runs:
        at = run.start
        while at < run.stop:
            taken = min(room, run.stop - at)
            message.append(slice(at, at + taken))
            at, room = at + taken, room - taken
            if room == 0:
                yield tuple(message)
                message, room = [], size
    if message:
        yield tuple(message)


def due_fragment(step: int, every: int, count: int) -> int | None:
    """The fragment that is sent at a step, of ``count`` spread evenly over ``every`` steps; the last at its multiples."""
    return next((number for number in range(count) if step % every == (number + 1) * every // count % every), None)
