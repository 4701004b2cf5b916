"""Reads and writes headers of safetensors files. A malicious file cannot make reading slow or take much memory.

Format: eight bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, data_offsets), the data.
https://huggingface.co/docs/safetensors. Imports no torch.
"""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from pathlib import Path
from typing import Any, NamedTuple

from distmerge.errors import UserError

ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
FLOATS = ("F64", "F32", "F16", "BF16")

HEADER_LIMIT_BYTES = 4 << 20
"""Enough for some 30,000 tensors. Parsed JSON takes about 20 times its size; the limit bounds what a crafted header costs."""

NAME_LIMIT = 1024
DIMENSIONS_LIMIT = 16


class Stored(NamedTuple):
    """A tensor in a file: its dtype (safetensors' name), shape and byte range, counted from the beginning of the file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Header(NamedTuple):
    """The tensors of a file, by name and in the order of their data, and the header's ``__metadata__``."""

    tensors: dict[str, Stored]
    metadata: dict[str, str]


class Duplicate(ValueError):
    """A key that occurs twice in one JSON object."""


def read_header(path: Path) -> Header:
    """Read the header of a safetensors file.

    Raises:
        UserError: when the file cannot be read, is truncated, or its header violates the format.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe would block
            raise UserError(f"{path} must be a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise UserError(f"{path} is truncated: a safetensors file has at least 8 bytes, got {size}")
            length = struct.unpack("<Q", prefix)[0]
            if length > size - 8:
                raise UserError(
                    f"{path} is truncated or not a safetensors file: the header must have <= {size - 8} bytes, got {length}"
                )
            if length > HEADER_LIMIT_BYTES:
                raise UserError(f"{path}: the header must have <= {HEADER_LIMIT_BYTES} bytes, got {length}")
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return parse_header(path, raw, size)


def parse_header(path: Path, raw: bytes, size: int) -> Header:
    """Parse the header's bytes and check that its tensors fill the file exactly, without gaps or overlaps.

    Args:
        size: of the whole file, in bytes.

    Raises:
        UserError: where they do not, or an entry violates the format.
    """
    # Objects and lists cost most when parsed. A tensor's entry has three, so a header with more holds something else.
    if raw.count(b"[") + raw.count(b"{") > 3 * raw.count(b'"dtype"') + 2:
        raise UserError(f"{path}: the header is not a table of tensors")
    try:
        table = json.loads(raw.decode(), object_pairs_hook=unique)
    except Duplicate as error:
        raise UserError(f"{path}: the header names {shown(str(error))} twice") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path}: the header is not valid JSON") from None
    if not isinstance(table, dict):
        raise UserError(f"{path}: the header is not a table of tensors")
    metadata = table.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: the header's __metadata__ must be a table of strings")
    data = len(raw) + 8
    entries = sorted(((name, checked(path, name, entry, data, size)) for name, entry in table.items()), key=position)
    at = data
    for name, entry in entries:
        if entry.start != at:
            raise UserError(f"{path}: the data of {shown(name)} must start at byte {at - data}, got {entry.start - data}")
        at = entry.stop
    if at != size:
        raise UserError(f"{path}: the tensors end at byte {at}, but the file ends at byte {size}")
    return Header(dict(entries), metadata)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict; :class:`Duplicate` when a key occurs twice, of which json would keep the last."""
    table = dict(pairs)
    if len(table) < len(pairs):
        seen: set[str] = set()
        raise Duplicate(next(name for name, _ in pairs if name in seen or seen.add(name)))
    return table


def checked(path: Path, name: str, entry: Any, data: int, size: int) -> Stored:
    """One entry of the header, after a check of every field.

    Args:
        data: where the data begins, in bytes from the file's start.
        size: of the whole file, in bytes.
    """
    where = f"{path}: {shown(name)}"
    if len(name) > NAME_LIMIT or not name.isprintable() or not name:
        raise UserError(f"{path}: a tensor's name must be 1 to {NAME_LIMIT} printable characters, got {shown(name)}")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{where} must have the keys dtype, shape and data_offsets and no others")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UserError(f"{where}: dtype must be one of {', '.join(ITEM_BYTES)}, got {shown(dtype)}")
    if not whole_numbers(shape) or len(shape) > DIMENSIONS_LIMIT:
        raise UserError(f"{where}: shape must be at most {DIMENSIONS_LIMIT} whole numbers >= 0, got {shown(shape)}")
    if not whole_numbers(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - data:
        raise UserError(f"{where}: data_offsets must lie in the file's {size - data} bytes of data, got {shown(offsets)}")
    if math.prod(shape) * ITEM_BYTES[dtype] != offsets[1] - offsets[0]:
        raise UserError(f"{where}: shape {shown(shape)} of {dtype} does not take {offsets[1] - offsets[0]} bytes")
    return Stored(path, dtype, tuple(shape), data + offsets[0], data + offsets[1])


def whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)


def position(item: tuple[str, Stored]) -> tuple[int, int, str]:
    """The sort key of an entry: where its data lies."""
    return item[1].start, item[1].stop, item[0]


def shown(value: Any) -> str:
    """A value from a file, short enough for an error's one line."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def encode_header(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The header of a file that holds ``tensors`` one after another.

    Args:
        tensors: dtype and shape by name, in the order of their data.

    Returns:
        all bytes before the data, and the offset from the file's start of each tensor's data, by name.
    """
    table: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    at = 0
    offsets: dict[str, int] = {}
    for name, (dtype, shape) in tensors.items():
        stop = at + math.prod(shape) * ITEM_BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, stop]}
        offsets[name], at = at, stop
    raw = json.dumps(table, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    prefix = struct.pack("<Q", len(raw)) + raw
    return prefix, {name: offset + len(prefix) for name, offset in offsets.items()}
