"""A worker's state on disk, read by any layout: parts of named, flattened parameters are put together again.

A file of a replicated worker holds whole parameters under their names; one of a sharded worker holds parts, under
``NAME@FIRST``, the part's first element.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor

from distmerge.theta.flat import Part


def part_key(part: Part) -> str:
    """The name of a part in a file."""
    return f"{part.name}@{part.first}"


def parts_in(tensors: dict[str, Tensor]) -> Iterator[tuple[str, int, Tensor]]:
    """(parameter, first element, the part flattened) of each parameter's part in a file; buffers are passed by."""
    for key, tensor in tensors.items():
        if key.startswith("buffer:"):
            continue
        name, _, first = key.partition("@")
        yield name, int(first or 0), tensor.reshape(-1)


class Pieces:
    """Values of flattened tensors by name, known in pieces."""

    def __init__(self) -> None:
        self.known: dict[str, list[tuple[int, Tensor]]] = defaultdict(list)

    def add(self, name: str, first: int, values: Tensor) -> None:
        self.known[name].append((first, values))

    def take(self, name: str, first: int, numel: int) -> Tensor:
        """Elements [first, first + numel) of a tensor, from all pieces that hold some of them."""
        result = torch.empty(numel)
        covered = 0
        for start, values in self.known[name]:
            low, high = max(first, start), min(first + numel, start + values.numel())
            if low < high:
                result[low - first : high - first] = values[low - start : high - start]
                covered += high - low
        assert covered == numel, f"{name} is not whole in the checkpoint: {covered} of {numel} elements from {first} on"
        return result
