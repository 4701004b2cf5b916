"""Plans the shards of a model that is about to be written: which tensor goes where. Imports no torch."""

from __future__ import annotations

import json
import math
from typing import NamedTuple

from distmerge.files.header import ITEM_BYTES, encode_header
from distmerge.files.models import INDEX

METADATA = {"format": "pt"}


class Shard(NamedTuple):
    """A file to be written: its name, its header, the offset of each tensor's data in it, and its size in bytes."""

    name: str
    header: bytes
    offsets: dict[str, int]
    bytes: int


def lay_out(tensors: dict[str, tuple[str, tuple[int, ...]]], shard_bytes: int) -> list[Shard]:
    """Split tensors into shards of at most ``shard_bytes`` of data, in their order; a larger tensor gets a shard of its own.

    Args:
        tensors: dtype (safetensors' name) and shape by name.
    """
    groups: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    filled = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * ITEM_BYTES[dtype]
        if groups[-1] and filled + size > shard_bytes:
            groups.append({})
            filled = 0
        groups[-1][name] = (dtype, shape)
        filled += size
    return [shard(group, index, len(groups)) for index, group in enumerate(groups)]


def shard(tensors: dict[str, tuple[str, tuple[int, ...]]], index: int, count: int) -> Shard:
    name = "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"
    # Wide dtypes first, so that each tensor starts at a multiple of its own width.
    ordered = dict(sorted(tensors.items(), key=lambda item: -ITEM_BYTES[item[1][0]]))
    header, offsets = encode_header(ordered, METADATA)
    data = sum(math.prod(shape) * ITEM_BYTES[dtype] for dtype, shape in ordered.values())
    return Shard(name, header, offsets, len(header) + data)


def index_of(shards: list[Shard]) -> dict[str, bytes]:
    """The content of the index file by its name; {} where there is only one shard, which needs no index."""
    if len(shards) == 1:
        return {}
    total = sum(part.bytes - len(part.header) for part in shards)
    weight_map = {name: part.name for part in shards for name in part.offsets}
    table = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {INDEX: (json.dumps(table, indent=2) + "\n").encode()}
