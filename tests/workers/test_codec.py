"""Rows of a message, written and read in place, against the wire's plain functions: to the bit, at sizes that break."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from distmerge.workers import codec
from distmerge.workers.codec import Row
from distmerge.workers.scratch import Scratch
from distmerge.workers.wire import BLOCK, WIRES, Wire

SIZES = ((64, 64), (64, 1), (640, 640), (640, 577), (640, 0), (64 * 2100, 64 * 2100 - 63))
"""Elements of a row, and of what is written into it: whole blocks, one element, a cut block, none, more than a piece."""


@pytest.fixture(params=["compiled", "plain"])
def code(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "plain":
        monkeypatch.setattr(codec, "library", lambda: None)
    elif codec.library() is None:
        pytest.skip("distmerge was installed where there is no C compiler")
    yield request.param


def values_of(numel: int) -> Tensor:
    """Numbers from the smallest to the largest that a float has, some of them zeros in a row."""
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)) * torch.logspace(-44, 37, numel)
    values[64:128] = 0
    return values


def row_of(wire: Wire, numel: int) -> Row:
    return Row(wire, torch.full((wire.size_bytes(numel),), 171, dtype=torch.uint8), numel)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN where the other is NaN, and 0 for -0 only where the other has it, too."""
    a, b = (torch.where(x.isnan(), torch.nan, x) for x in (a, b))
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("name", WIRES)
@pytest.mark.parametrize(("numel", "written"), SIZES)
def test_a_row_holds_the_bytes_of_the_plain_functions(code: str, name: str, numel: int, written: int) -> None:
    wire, values = WIRES[name], values_of(written)
    padded = torch.zeros(numel)
    padded[:written] = values
    row = row_of(wire, numel)
    row.encode(values)
    assert torch.equal(row.memory, wire.encode(padded))
    read = torch.empty(written)
    row.decode(read)
    assert same_bits(read, wire.decode(row.memory, numel)[:written])
    total = torch.linspace(-1, 1, numel)
    expected = total + wire.decode(row.memory, numel) * torch.tensor(0.3)
    row.add_to(total, 0.3)
    assert same_bits(total, expected)


@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
@pytest.mark.parametrize(("numel", "written"), SIZES)
def test_what_rounding_lost_is_added_to_the_next_message(code: str, name: str, numel: int, written: int) -> None:
    wire, values, row = WIRES[name], values_of(written), row_of(WIRES[name], numel)
    residual, expected = torch.zeros(numel), torch.zeros(numel)
    for _ in range(3):
        row.encode(values, residual)
        whole = expected.clone()
        whole[:written] += values
        assert torch.equal(row.memory, wire.encode(whole))
        expected = whole - wire.decode(row.memory, numel)
        assert same_bits(residual, expected)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("unhealthy", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_in_its_whole_block_and_in_no_other(code: str, name: str, unhealthy: float) -> None:
    values, row, read = torch.ones(3 * BLOCK), row_of(WIRES[name], 3 * BLOCK), torch.empty(3 * BLOCK)
    values[BLOCK + 5] = unhealthy
    row.encode(values)
    row.decode(read)
    finite = read.isfinite().view(3, BLOCK)
    assert not finite[1, 5] and finite[0].all() and finite[2].all()
    assert torch.equal(finite, WIRES[name].decode(WIRES[name].encode(values), 3 * BLOCK).isfinite().view(3, BLOCK))


def test_buffers_are_used_again() -> None:
    rooms = Scratch(torch.device("cpu"))
    first, second = rooms.take(8, torch.uint8), rooms.take(8, torch.uint8)
    assert first.data_ptr() != second.data_ptr()
    rooms.give(first.view(2, 4))
    assert rooms.take(8, torch.uint8).data_ptr() == first.data_ptr()
    assert rooms.take(8, torch.float32).dtype == torch.float32
