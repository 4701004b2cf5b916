"""Compiled TIES against the same in single operations: to the bit, at sizes that break."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from distmerge.rules import ties
from distmerge.rules.combine import Combine
from distmerge.rules.protocol import run
from distmerge.rules.sparsify import ByMagnitude
from distmerge.rules.task import TaskVectors
from distmerge.rules.threshold import histogram, signed_patterns

SIZES = (1, 31, 32, 33, 255, 256, 257, 5000, 70_001)
COMBINES = [
    Combine(elect, cancel, divide, scale)
    for elect, cancel, divide, scale in itertools.product(
        ("before", "after"), ("positive", "zero"), ("none", "count", "weights"), (1.0, -0.7)
    )
]


def vectors(numel: int, count: int) -> list[Tensor]:
    """Task vectors of every magnitude, with zeros of both signs, equal ones, and some that cancel one another."""
    generator = torch.Generator().manual_seed(numel)
    found = []
    for _ in range(count):
        scale = 10.0 ** torch.randint(-40, 3, (numel,), generator=generator)
        vector = torch.randn(numel, generator=generator) * scale
        vector[torch.rand(numel, generator=generator) < 0.2] = 0.0
        vector[torch.rand(numel, generator=generator) < 0.1] = -0.0
        vector[torch.rand(numel, generator=generator) < 0.2] = 0.25
        found.append(vector)
    cancels = torch.rand(numel, generator=generator) < 0.1
    found[-1] = torch.where(cancels, -found[0], found[-1])
    return found


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Calls a function as where there is no C compiler."""

    def call(work: Callable[[], Tensor]) -> Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(ties, "library", lambda: None)
            return work()

    return call


def test_it_is_used():
    """Else the tests below would compare nothing: every installation that this suite runs in has a compiler."""
    assert ties.library() is not None


@pytest.mark.parametrize("numel", SIZES)
def test_counts_of_magnitudes_are_the_same(numel, plain):
    bits = signed_patterns(torch.stack(vectors(numel, 3)), torch.float32)
    for level, bins in ((0, []), (1, [0, 0x3E80, 0x3F80])):
        counts = histogram(bits, level, 2, bins)
        assert torch.equal(counts, plain(lambda level=level, bins=bins: histogram(bits, level, 2, bins)))
        assert level == 1 or counts.sum(1).tolist() == [numel] * 3


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("weights", [[1.0] * 5, [0.3, 1.7, 0.4, 1.1, 1.5], [0.3, -0.9, 0.4, 0.0, 2.0]])
def test_elections_have_the_same_bits(count, weights, plain):
    for numel, combine in itertools.product(SIZES, COMBINES):
        members, base = vectors(numel, count), torch.linspace(-1, 1, numel)
        for origin in (None, base):
            rule = TaskVectors(weights[:count], combine, None, "none", torch.float32, numel)
            compiled = run(rule, members, origin, block=3000)
            single = plain(lambda rule=rule, members=members, origin=origin: run(rule, members, origin, block=3000))
            assert torch.equal(compiled.view(torch.int32), single.view(torch.int32)), (numel, combine)


@pytest.mark.parametrize("on_tie", ["first", "keep"])
def test_a_trim_and_its_election_have_the_same_bits(on_tie, plain):
    members = vectors(70_001, 3)
    sparsifier = ByMagnitude([0.2, 0.5, 0.01], None, on_tie, torch.float32)
    rule = TaskVectors([1.0, 0.5, 2.0], Combine("after", divide="weights"), sparsifier, "none", torch.float32, 70_001)
    assert torch.equal(run(rule, members, block=4096), plain(lambda: run(rule, members, block=4096)))


def test_what_is_merged_is_left_as_it_was():
    members = vectors(1000, 2)
    copies = [member.clone() for member in members]
    sparsifier = ByMagnitude([0.2, 0.5], None, "keep", torch.float32)
    for thin in (None, sparsifier):
        run(TaskVectors([1.0, 0.5], Combine("before", divide="count"), thin, "none", torch.float32, 1000), members)
    assert all(torch.equal(a, b) for a, b in zip(members, copies, strict=True))
