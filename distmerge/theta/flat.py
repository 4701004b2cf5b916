"""Theta as one vector.

A worker's trainable parameters become one contiguous float32 vector, and the model's parameters views of it. A merge, a
fragment, a sparse subset, a snapshot or a running mean is then one operation on a vector or a slice of it. Where a worker
spans ranks, each has a vector of its own: contiguous parts of the flattened parameters, see :mod:`distmerge.engine`.

    flat = FlatParameters(model)   # idempotent
    flat.pull()                    # before reading flat.vector
    flat.push()                    # after writing it
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import operator
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.errors import UserError


@dataclass(frozen=True)
class Slot:
    """Where one parameter, or a part of it, lies in the vector.

    Attributes:
        shape: of the whole parameter.
        first: the part's first element in the flattened parameter.
        part: how many elements it has; None for the whole.
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
    """What this rank's vector holds of a parameter: elements [first, first + numel) of it, flattened, from ``offset`` on."""

    name: str
    first: int
    numel: int
    offset: int


class FlatParameters:
    """The trainable parameters of a model as one float32 vector with a fixed layout.

    Where every parameter is float32 they are views of the vector, and pull and push do nothing. Otherwise (a bfloat16
    model, say) the vector is a float32 copy that they fill and empty. Tied weights lie in it once, frozen ones not at all.
    Never rebind ``parameter.data`` afterwards, and don't move the model: write in place.

    Attributes:
        vector: ``[n]`` float32, what this rank merges.
        start: where the vector begins in the layout.
        layout: a slot for each parameter, in the model's own order; empty ones included.
        inside: process group of the ranks that hold theta together; None where this one holds it alone.
    """

    inside: Any = None
    in_place = True
    """Whether the model's parameters may become views."""
    has_masters = False
    """Whether the engine keeps a float32 master of each 16-bit parameter, which is what merges."""

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
        """Bring the vector up to date with the model."""
        self.check()
        if not self._views:
            self._copy(into_model=False)

    def push(self) -> None:
        """Bring the model up to date with the vector."""
        if not self._views:
            self._copy(into_model=True)

    def written(self, values: Tensor, part: slice) -> Tensor:
        """What the model holds of ``values`` after push(), in a part of the vector: rounded to the parameters' own dtype.

        A bfloat16 model without float32 masters moves in steps of one unit in the last place. What it trained since it was
        given an anchor is its distance to the rounded anchor; to the anchor itself, such a step is mostly rounding.
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
        """Complete sums over this rank's part of theta to sums over all of it, in place."""
        if self.inside is not None:
            cast(Any, dist).all_reduce(scalars, group=self.inside)  # its stub leaves out the types

    def parts(self) -> list[Part]:
        """The parts of parameters that this rank's vector holds, and where, in the layout's order."""
        found: list[Part] = []
        for slot in self.layout:
            low, high = max(slot.offset, self.start), min(slot.stop, self.start + self.vector.numel())
            if low < high:
                found.append(Part(slot.name, slot.first + low - slot.offset, high - low, low - self.start))
        return found

    def named_tensors(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that lie in the layout, as the model and its optimizer know them."""
        return zip((slot.name for slot in self.layout), self._parameters, strict=True)

    @property
    def numel(self) -> int:
        """Elements of theta, over all ranks that hold it."""
        return sum(math.prod(slot.shape) for slot in self.layout)

    def check(self) -> None:
        """Refuse a model that trains other parameters than those that were laid out, or keeps them elsewhere."""
        check_identity(self.model, [slot.name for slot in self.layout], self._parameters)
        if not self._views:
            return
        for slot, parameter in zip(self.layout, self._parameters, strict=True):
            if parameter.data_ptr() != self.whole.data_ptr() + 4 * slot.offset and slot.numel:
                raise UserError(f"parameter {slot.name} was moved after the merger was made; make the merger after model.to()")

    def named_views(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter's name and its part of the whole vector, in its own shape."""
        for slot in self.layout:
            yield slot.name, self.whole[slot.offset : slot.stop].view(slot.shape)

    @cached_property
    def manifest(self) -> int:
        """63 bits that two models share only if names, shapes and order of what merges agree, and the buffers' types."""
        parameters = [(slot.name, slot.shape, slot.first, slot.numel) for slot in self.layout]
        buffers = [(name, tuple(buffer.shape), str(buffer.dtype)) for name, buffer in self.model.named_buffers()]
        frozen = [(name, tuple(p.shape)) for name, p in self.model.named_parameters() if not p.requires_grad]
        text = repr((parameters, buffers, frozen))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def _laid_out(self) -> Tensor | None:
        """The vector that an earlier call made, if the parameters are still views of it in this very order."""
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


def check_identity(model: nn.Module, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Refuse a model whose trainable parameters are not the very objects that were laid out under these names.

    Otherwise the parameters that replaced them would never be merged, and the workers would drift apart silently.
    """
    present = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(present) == len(parameters) and all(map(operator.is_, present, parameters)):
        return
    laid_out = dict(zip(names, parameters, strict=True))
    there = dict(model.named_parameters(remove_duplicate=False))
    known = {id(parameter) for parameter in parameters}
    for name, parameter in there.items():
        if parameter.requires_grad and id(parameter) not in known:
            what = (
                "is not the one that the merger was made with: use load_state_dict() without assign=True, and make the merger "
                "after modules are replaced"
                if name in laid_out
                else "trains, but did not when the merger was made: make the merger after parameters are added or unfrozen"
            )
            raise UserError(f"parameter {name} {what}")
    kept = {id(parameter): parameter.requires_grad for parameter in there.values()}
    for name, parameter in laid_out.items():
        if not kept.get(id(parameter), False):
            what = "was frozen" if id(parameter) in kept else "was taken out of the model"
            raise UserError(f"parameter {name} {what} after the merger was made: make the merger anew")


def check_dtype(name: str, parameter: Tensor) -> None:
    """Refuse dtypes wider than float32, in which merges compute: such parameters would silently lose their low bits."""
    if not parameter.is_floating_point():
        raise UserError(f"parameter {name} must be floating point, got {parameter.dtype}")
    if parameter.dtype == torch.float64:
        raise UserError(
            f"parameter {name} must be float32, float16 or bfloat16, since merges are in float32, got torch.float64"
        )


def check_parameters(named: list[tuple[str, nn.Parameter]]) -> None:
    if not named:
        raise UserError("the model has no trainable parameter, so there is nothing to merge")
    seen: dict[int, str] = {}
    for name, parameter in named:
        check_dtype(name, parameter)
        if parameter.device != named[0][1].device:
            raise UserError(f"parameter {name} is on {parameter.device}, but {named[0][0]} on {named[0][1].device}")
        other = seen.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if other != name:
            raise UserError(f"parameters {other} and {name} share memory but are two objects; tie them as one parameter")


def pieces(tensor: Tensor, start: int, stop: int) -> Iterator[slice]:
    """Slices that cover [start, stop): cache-sized on a CPU, where a chain of operations on a piece then reads and writes
    memory once; one slice on a GPU, where launches cost more than they save."""
    size = 1 << 18 if tensor.device.type == "cpu" else stop - start
    for at in range(start, stop, max(1, size)):
        yield slice(at, min(at + size, stop))


def fingerprint(tensor: Tensor) -> Tensor:
    """A 64-bit checksum of a tensor's bits and their positions, as an int64 scalar on its device."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 4)]).view(torch.int32)
    digest = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for part in pieces(raw, 0, raw.numel()):
        # An odd multiplier for each position: swapped or changed words change the sum, which wraps at 64 bits.
        position = torch.arange(part.start, part.stop, device=tensor.device, dtype=torch.int64) * 2 + 1
        digest += (raw[part].to(torch.int64) * (position * 0x9E3779B1 | 1)).sum()
    return digest
