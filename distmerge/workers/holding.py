"""The parts of tensors that a rank holds, and the measurements over whole tensors that several ranks hold in parts.

A tensor may be cut by the shares of an exchange, and by the ranks of a worker. Each holder measures its own blocks, and the
measurements are gathered, so that a rule settles on every holder with the same bits. Tensors on a single rank need no gather.
"""

from __future__ import annotations

import pickle
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.errors import UserError
from distmerge.rules.protocol import Block, Rule, Tally, run
from distmerge.workers.collectives import all_gather_object
from distmerge.workers.ledger import Ledger
from distmerge.workers.shares import CUT, Piece

T = TypeVar("T")

Rows = Callable[[int, int], list[Tensor]]
"""``rows(start, stop)``: the members' elements of a range, counted from the start of the first piece."""


class Place(NamedTuple):
    """One block of a tensor: its range in the message, its offset in the tensor, its number among the tensor's blocks."""

    start: int
    stop: int
    offset: int
    number: int


class Holding:
    """This rank's pieces of tensors in a message.

    Args:
        pieces: the pieces on this rank.
        shapes: the number of elements of every tensor that any of the ranks holds, by name.
        unit: gives for a tensor how many elements make a unit, which no block may divide.
        groups: the ranks that hold parts of the tensors. All of them gather, over one group after the other.
        ledger: counts the bytes that this rank sends to the first group; None if the groups lie inside a worker.
        grain: elements of a block.

    Attributes:
        torn: small tensors that are cut within a unit, such as a norm's gain (a single row) in shards. They are gathered and
            merged as a whole on every rank that holds a part.

    Raises:
        UserError: if a larger tensor is cut within a unit. It is raised on all ranks of the first group.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        shapes: dict[str, int],
        unit: Callable[[str], int],
        groups: Sequence[dist.ProcessGroup],
        ledger: Ledger | None = None,
        grain: int = CUT,
    ):
        self.shapes = shapes
        self.pieces, self.groups, self.ledger, self.unit = pieces, groups, ledger, unit
        self.grain = grain
        self.start = pieces[0].start if pieces else 0
        self.torn: set[str] = set()
        starts = [(piece.name, offset) for piece in pieces for _, _, offset in self._spans(piece)]
        torn = [piece.name for piece in pieces if self._is_torn(piece, shapes[piece.name])]
        found: dict[str, list[int]] = defaultdict(list)
        holders: dict[str, int] = defaultdict(int)
        for theirs, their_torn in self._gathered((starts, torn), counted=False):
            self.torn |= set(their_torn)
            if large := [name for name in their_torn if shapes[name] > CUT or ledger is not None]:
                raise UserError(f"the rule needs whole rows, and {large[0]} is cut inside one between ranks")
            for name in {name for name, _ in theirs}:
                holders[name] += 1
            for name, offset in theirs:
                found[name].append(offset)
        self.starts = {name: sorted(offsets) for name, offsets in found.items()}
        self.shared = sorted(name for name, count in holders.items() if count > 1 and name not in self.torn)

    def places(self, piece: Piece) -> Iterator[Place]:
        for start, stop, offset in self._spans(piece):
            yield Place(start, stop, offset, bisect_left(self.starts[piece.name], offset))

    def settle(self, rules: dict[str, Rule], rows: Rows) -> dict[str, Any]:
        """Run the passes of each tensor's rule over all of its blocks.

        Args:
            rules: the rule of every tensor that any of the ranks holds. All ranks must give the same passes.

        Returns:
            the settled state of each tensor that has a part on this rank.
        """
        states: dict[str, Any] = dict.fromkeys(rules)
        rules = {name: rule for name, rule in rules.items() if name not in self.torn}
        here = {piece.name for piece in self.pieces}
        for step in range(max((rule.passes for rule in rules.values()), default=0)):
            tallies = {name: Tally() for name, rule in rules.items() if step < rule.passes}
            for piece in self.pieces:
                if piece.name not in tallies:
                    continue
                for place in self.places(piece):
                    block = Block(rows(place.start - self.start, place.stop - self.start), None, place.offset, place.number)
                    tallies[piece.name].add(place.number, rules[piece.name].measure(step, block, states[piece.name]))
            self._join([name for name in self.shared if name in tallies], tallies)
            for name in tallies.keys() & here:
                states[name] = rules[name].settle(step, tallies[name], states[name])
        return states

    def merge(self, rules: dict[str, Rule], states: dict[str, Any], rows: Rows, out: Tensor) -> None:
        """Merge every block on this rank. ``out`` has the layout of ``rows`` and may be the memory of one of them."""
        for piece, whole in self._whole(rows):
            merged = run(rules[piece.name], whole)
            out[piece.start - self.start : piece.stop - self.start] = merged[
                piece.first : piece.first + piece.stop - piece.start
            ]
        for piece in self.pieces:
            if piece.name in self.torn:
                continue
            for place in self.places(piece):
                block = Block(rows(place.start - self.start, place.stop - self.start), None, place.offset, place.number)
                out[place.start - self.start : place.stop - self.start] = rules[piece.name].merge(block, states[piece.name])

    def _whole(self, rows: Rows) -> Iterator[tuple[Piece, list[Tensor]]]:
        """The pieces of torn tensors on this rank, each with the members' whole tensors."""
        here = [piece for piece in self.pieces if piece.name in self.torn]
        parts = [(piece.name, piece.first, rows(piece.start - self.start, piece.stop - self.start)) for piece in here]
        gathered = [one for theirs in self._gathered(parts) for one in theirs] if self.torn else []
        for piece in here:
            own = sorted(((first, members) for name, first, members in gathered if name == piece.name), key=lambda one: one[0])
            yield piece, [torch.cat([members[index] for _, members in own]) for index in range(len(own[0][1]))]

    def _spans(self, piece: Piece) -> Iterator[tuple[int, int, int]]:
        for start, stop in piece.spans(self.unit(piece.name), self.grain):
            yield start, stop, piece.first + start - piece.start

    def _is_torn(self, piece: Piece, numel: int) -> bool:
        unit, last = self.unit(piece.name), piece.first + piece.stop - piece.start
        return piece.first % unit != 0 or (last % unit != 0 and last != numel)

    def _join(self, names: list[str], tallies: dict[str, Tally]) -> None:
        """Complete the tallies of tensors that several ranks hold, by gathering them."""
        if not names:
            return
        here = {piece.name for piece in self.pieces}
        own = {name: tallies[name] for name in names if name in here}
        for name in own:
            tallies[name] = Tally()
        for theirs in self._gathered(own):
            for name, tally in theirs.items():
                tallies[name].join(tally)

    def _gathered(self, own: T, counted: bool = True) -> list[T]:
        """Every holder's value, in the order of the ranks. With ``counted`` the ledger counts the bytes."""
        said = [own]
        for index, group in enumerate(self.groups):
            size = dist.get_world_size(group)
            if index == 0 and counted and self.ledger is not None:
                self.ledger.exchange(len(pickle.dumps(said)) * (size - 1))
            said = [one for answer in all_gather_object(said, group) for one in answer]
        return said
