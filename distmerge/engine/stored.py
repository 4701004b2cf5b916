"""The format of a worker's parameters in a checkpoint, which a run with any layout can read.

A file of a replicated worker holds whole parameters under their names. A file of a sharded worker holds parts of flattened
parameters under ``NAME@FIRST``, where FIRST is the index of the part's first element.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from distmerge.theta.flat import Part


def part_key(part: Part) -> str:
    """The name under which a part is stored in a file."""
    return f"{part.name}@{part.first}"


def parts_in(tensors: dict[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    """Yield (parameter's name, index of the first element, flattened values) for each part in a file. Buffers are skipped."""
    for key, tensor in tensors.items():
        if key.startswith("buffer:"):
            continue
        name, _, first = key.partition("@")
        yield name, int(first or 0), tensor.reshape(-1)


class Pieces:
    """Flattened tensors by name, collected piece by piece, from which any range can be taken.

    pieces = Pieces()
    pieces.add("w", 0, first_three)   # elements 0 to 2, written by one rank
    pieces.add("w", 3, last_two)      # elements 3 to 4, written by another
    pieces.take("w", 2, 2)            # elements 2 to 3
    """

    def __init__(self) -> None:
        self.known: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)

    def add(self, name: str, first: int, values: Tensor) -> None:
        self.known[name].append((first, values))

    def take(self, name: str, first: int, numel: int) -> Tensor:
        """Elements [first, first + numel) of a tensor, put together from all pieces that overlap with them."""
        result = torch.empty(numel)
        covered = 0
        for start, values in self.known[name]:
            low, high = max(first, start), min(first + numel, start + values.numel())
            if low < high:
                result[low - first : high - first] = values[low - start : high - start]
                covered += high - low
        assert covered == numel, f"the checkpoint holds {covered} of the {numel} elements of {name} from {first} on"
        return result
