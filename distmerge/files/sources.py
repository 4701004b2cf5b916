"""Sources of a tensor's elements: a memory-mapped file, a tensor in memory, or another source rounded to a dtype."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from distmerge.files.header import Stored

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Source(Protocol):
    """A tensor that is read piece by piece."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def stored(self) -> tuple[Stored, ...]:
        """The tensors on disk that it is computed from."""
        ...

    def read(self, start: int, stop: int) -> Tensor:
        """Elements ``start`` to ``stop`` of the flattened tensor, ``[stop - start]``. The caller must not write to them."""
        ...


class Maps:
    """The memory maps of the files that a merge reads, each opened once. Mapped pages belong to the page cache, so that the
    kernel can drop them when memory is short."""

    def __init__(self) -> None:
        self._open: dict[Path, mmap.mmap] = {}

    def of(self, path: Path) -> mmap.mmap:
        if path not in self._open:
            with open(path, "rb") as file:
                # A private map is writable, as torch.frombuffer wants it, and costs no memory unless somebody writes to it.
                mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
            self._open[path] = mapped
        return self._open[path]


class OnDisk:
    """A tensor in a file. Reading gives views of the memory map, without copies."""

    def __init__(self, entry: Stored, maps: Maps):
        self.shape, self.dtype, self.stored = entry.shape, DTYPES[entry.dtype], (entry,)
        self._buffer = maps.of(entry.file)

    def read(self, start: int, stop: int) -> Tensor:
        size = self.dtype.itemsize
        at, count = self.stored[0].start + start * size, stop - start
        if count == 0:
            return torch.empty(0, dtype=self.dtype)
        if at % size:  # the format allows unaligned data, but torch's vectorised loads expect aligned addresses
            raw = np.frombuffer(self._buffer, dtype=np.uint8, count=count * size, offset=at).copy()
            return torch.from_numpy(raw).view(self.dtype)
        return torch.frombuffer(self._buffer, dtype=self.dtype, count=count, offset=at)


class InMemory:
    """A tensor that is in memory and has no file."""

    stored = ()

    def __init__(self, values: Tensor):
        self.shape, self.dtype, self._flat = tuple(values.shape), values.dtype, values.reshape(-1)

    def read(self, start: int, stop: int) -> Tensor:
        return self._flat[start:stop]


class Cast:
    """A source whose elements are first rounded to a dtype."""

    def __init__(self, source: Source, dtype: torch.dtype):
        self.shape, self.dtype, self.stored, self._source = source.shape, dtype, source.stored, source

    def read(self, start: int, stop: int) -> Tensor:
        return self._source.read(start, stop).to(self.dtype)
