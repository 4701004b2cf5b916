"""Theta, a worker's trainable parameters, as one contiguous float32 vector of which the model's parameters become views.

A merge, a fragment, a sparse subset, a snapshot or a running mean is then one operation on a vector or a slice of it. If a
worker spans several ranks, each rank has a vector of its own, made of contiguous parts of the flattened parameters, see
:mod:`distmerge.engine`.

    flat = FlatParameters(model)   # idempotent
    flat.pull()                    # before reading flat.vector
    flat.push()                    # after writing it
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.errors import UserError
from distmerge.theta.checks import check_identity, check_parameters


@dataclass(frozen=True)
class Slot:
    """Where one parameter, or a part of it, lies in the layout.

    Attributes:
        shape: shape of the whole parameter.
        offset: index of the slot's first element in the layout.
        first: index of the part's first element in the flattened parameter.
        part: number of elements of the part; None for the whole parameter.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    first: int = 0
    part: int | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape) if self.part is None else self.part

    @property
    def stop(self) -> int:
        return self.offset + self.numel


@dataclass(frozen=True)
class Part:
    """The part of a parameter that this rank's vector holds: elements [first, first + numel) of the flattened parameter are
    ``vector[offset : offset + numel]``."""

    name: str
    first: int
    numel: int
    offset: int


class FlatParameters:
    """The trainable parameters of a model as one float32 vector with a fixed layout.

    If every parameter is float32, the parameters become views of the vector, and pull() and push() copy nothing. Otherwise, as
    with a bfloat16 model, the vector is a float32 copy: pull() fills it, push() writes it back. Tied weights are included once,
    frozen ones not at all. Never rebind ``parameter.data`` afterwards and don't move the model; write in place.

    With parameters ``a`` of shape [2, 2] and ``b`` of shape [3], the layout is ``Slot("a", (2, 2), 0), Slot("b", (3,), 4)`` and
    ``vector`` has 7 elements. If two ranks of a worker share it, rank 1 merges ``whole[3:7]``: its ``start`` is 3, and its
    ``parts()`` are ``Part("a", 3, 1, 0)`` and ``Part("b", 0, 3, 1)``.

    Attributes:
        vector: ``[n]`` float32, the part that this rank merges.
        whole: float32, all slots of the layout; the same tensor as ``vector`` unless several ranks share them.
        start: index of the vector's first element in the layout.
        layout: a slot for each trainable parameter, in the model's order, including empty ones.
        inside: process group of the worker's ranks; None if this rank holds all of theta.

    Raises:
        UserError: if there is no trainable parameter, or one has a dtype or a device that cannot be merged.
    """

    inside: Any = None
    in_place = True
    """Whether the model's parameters may become views of the vector."""
    has_masters = False
    """Whether the engine keeps float32 master weights of 16-bit parameters. Then the masters are merged."""

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        check_parameters(named)
        offsets = [0]
        for _, parameter in named:
            offsets.append(offsets[-1] + parameter.numel())
        self.layout = tuple(Slot(name, tuple(p.shape), at) for (name, p), at in zip(named, offsets, strict=False))
        self.model = model
        self._parameters = [p for _, p in named]
        self._views = self.in_place and all(p.dtype == torch.float32 for p in self._parameters)
        laid_out = self._laid_out()
        self.whole = self._lay_out(offsets[-1]) if laid_out is None else laid_out
        self.vector, self.start = self.whole, 0

    def pull(self) -> None:
        """Update the vector from the model.

        Raises:
            UserError: if the model's parameters are no longer those that were laid out.
        """
        self.check()
        if not self._views:
            self._copy(into_model=False)

    def push(self) -> None:
        """Update the model from the vector."""
        if not self._views:
            self._copy(into_model=True)

    def written(self, values: Tensor, part: slice) -> Tensor:
        """``values`` as the model holds them after push(): rounded to the dtype of each parameter.

        A bfloat16 model without float32 masters stores a rounded anchor. What it has trained since then is its distance from
        the rounded anchor. Its distance from the float32 anchor would be mostly rounding error.

        Args:
            values: float32, one value for each element of ``part``.
            part: the elements of the vector in question.
        """
        if len(set(self.stored_dtypes)) <= 1:
            return values.to(self.stored_dtypes[0]).float() if self.stored_dtypes else values
        rounded = values.clone()
        for slot, dtype in zip(self.layout, self.stored_dtypes, strict=True):
            low, high = max(slot.offset - self.start, part.start), min(slot.stop - self.start, part.stop)
            if low < high:
                here = slice(low - part.start, high - part.start)
                rounded[here] = values[here].to(dtype).float()
        return rounded

    @cached_property
    def stored_dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtype in which the model stores each slot of the layout between merges; () if all are float32."""
        dtypes = () if self._views or self.has_masters else tuple(parameter.dtype for parameter in self._parameters)
        return () if set(dtypes) <= {torch.float32} else dtypes

    @contextlib.contextmanager
    def borrowed(self) -> Generator[Tensor, None, None]:
        """A context in which the vector may hold other values, which push() writes to the model. At its end every bit of the
        parameters is restored."""
        self.pull()
        own = self.vector.clone()
        try:
            yield self.vector
        finally:
            self.vector.copy_(own)
            self.push()

    def sum_over_shards(self, scalars: Tensor) -> None:
        """Turn sums over this rank's part of theta into sums over all of it, in place; a collective inside the worker."""
        if self.inside is not None:
            cast(Any, dist).all_reduce(scalars, group=self.inside)  # its stub leaves out the types

    def parts(self) -> list[Part]:
        """The parts of parameters that this rank's vector holds, in the layout's order."""
        found: list[Part] = []
        for slot in self.layout:
            low, high = max(slot.offset, self.start), min(slot.stop, self.start + self.vector.numel())
            if low < high:
                found.append(Part(slot.name, slot.first + low - slot.offset, high - low, low - self.start))
        return found

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The name and the model's own parameter for each slot of the layout."""
        return zip((slot.name for slot in self.layout), self._parameters, strict=True)

    @property
    def numel(self) -> int:
        """Number of elements of theta, over all ranks of the worker."""
        return sum(math.prod(slot.shape) for slot in self.layout)

    def check(self) -> None:
        """Refuse a model whose trainable parameters were replaced or moved after they were laid out.

        Raises:
            UserError: naming the parameter.
        """
        check_identity(self.model, [slot.name for slot in self.layout], self._parameters)
        if not self._views:
            return
        for slot, parameter in zip(self.layout, self._parameters, strict=True):
            if parameter.data_ptr() != self.whole.data_ptr() + 4 * slot.offset and slot.numel:
                raise UserError(f"parameter {slot.name} was moved after the merger was made; make the merger after model.to()")

    def named_views(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and its view of the whole vector, in the parameter's shape."""
        for slot in self.layout:
            yield slot.name, self.whole[slot.offset : slot.stop].view(slot.shape)

    @cached_property
    def manifest(self) -> int:
        """A hash of 63 bits of the layout (names, shapes, order), the buffers (names, shapes, dtypes) and the frozen parameters
        (names, shapes): workers whose models differ in one of them can't merge."""
        parameters = [(slot.name, slot.shape, slot.first, slot.numel) for slot in self.layout]
        buffers = [(name, tuple(buffer.shape), str(buffer.dtype)) for name, buffer in self.model.named_buffers()]
        frozen = [(name, tuple(p.shape)) for name, p in self.model.named_parameters() if not p.requires_grad]
        text = repr((parameters, buffers, frozen))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def _laid_out(self) -> Tensor | None:
        """The vector of an earlier FlatParameters of this model, if the parameters are still views of it in this order."""
        if not self._views:
            return None
        filled = [(slot, p) for slot, p in zip(self.layout, self._parameters, strict=True) if slot.numel]
        if not filled:
            return None
        first, numel = filled[0][1], self.layout[-1].stop
        if first.untyped_storage().nbytes() != 4 * numel or first.storage_offset() != 0:
            return None
        in_place = all(p.data_ptr() == first.data_ptr() + 4 * slot.offset and p.is_contiguous() for slot, p in filled)
        return first.detach().as_strided((numel,), (1,), 0) if in_place else None

    def _lay_out(self, numel: int) -> Tensor:
        whole = torch.empty(numel, dtype=torch.float32, device=self._parameters[0].device)
        for slot, parameter in zip(self.layout, self._parameters, strict=True):
            view = whole[slot.offset : slot.stop].view(slot.shape)
            view.copy_(parameter.detach())
            if self._views:
                parameter.data = view
        return whole

    @torch.no_grad()
    def _copy(self, into_model: bool) -> None:
        for (_, view), parameter in zip(self.named_views(), self._parameters, strict=True):
            parameter.copy_(view) if into_model else view.copy_(parameter)


def pieces(tensor: Tensor, start: int, stop: int) -> Iterator[slice]:
    """Slices that cover [start, stop). On a CPU they fit the cache, so that a chain of operations on one piece reads and writes
    memory only once. On a GPU there is one slice, since further kernel launches would cost more than they save."""
    size = 1 << 18 if tensor.device.type == "cpu" else stop - start
    for at in range(start, stop, max(1, size)):
        yield slice(at, min(at + size, stop))


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit checksum of a tensor's bits and their positions, as an int64 scalar on its device."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 4)]).view(torch.int32)
    digest = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in pieces(raw, 0, raw.numel()):
        # Each position has an odd multiplier of its own, so changed and swapped words change the sum, which wraps at 64 bits.
        position = torch.arange(part.start, part.stop, device=tensor.device, dtype=torch.int64) * 2 + 1
        digest += (raw[part].to(torch.int64) * (position * 0x9E3779B1 | 1)).sum()
    return digest
