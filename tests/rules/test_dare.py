"""Compiled DARE against the same in single operations: to the bit, at sizes that break."""

from __future__ import annotations

import pytest
import torch

from distmerge.rules.combine import Combine
from distmerge.rules.dare import Dare, library
from distmerge.rules.protocol import LANES, folded, run
from distmerge.rules.sparsify import AtRandom
from distmerge.rules.task import TaskVectors

SIZES = (1, LANES - 1, LANES, LANES + 1, 5 * LANES, 7 * LANES + 3, 40_000)
COMBINES = (Combine(), Combine("after"), Combine("after", scale=0.7), Combine(scale=-1.5))


def tensors(numel: int, count: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Members near a base, some elements equal to it, some as far apart as the dtype goes, some tiny."""
    generator = torch.Generator().manual_seed(numel)
    base = torch.randn(numel, generator=generator)
    members = []
    for _ in range(count):
        scale = 10.0 ** torch.randint(-38, 3, (numel,), generator=generator)
        moved = torch.rand(numel, generator=generator) < 0.8
        members.append((base * (torch.rand(numel, generator=generator) < 0.9) + moved * scale * base.flip(0)).to(dtype))
    return members, base.to(dtype)


@pytest.mark.skipif(library() is None, reason="distmerge was installed where there is no C compiler")
@pytest.mark.parametrize("rescale", ["l1", "inverse", "none"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_bits(rescale, count):
    dtype = torch.bfloat16
    weights, density = [0.3, -0.9, 0.4][:count], [0.5, 0.3, 1.0][:count]
    for numel in SIZES:
        members, base = tensors(numel, count, dtype)
        for combine in COMBINES:
            rules = [
                kind(weights, combine, AtRandom(density, [3, 4, 5][:count]), rescale, dtype, numel)
                for kind in (Dare, TaskVectors)
            ]
            compiled, plain = (run(rule, members, base, block=3000) for rule in rules)
            assert torch.equal(compiled.view(torch.int32), plain.view(torch.int32)), (numel, combine)


def test_it_is_used():
    """Else the test above would compare nothing: every installation that this suite runs in has a compiler."""
    assert library() is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("combine", [Combine("before"), Combine(divide="count"), Combine("after", on_cancel="zero")])
def test_others_are_left_to_single_operations(combine, dtype):
    members, base = tensors(1000, 2, dtype)
    thin = AtRandom([0.5, 0.5], [3, 4])
    rules = [kind([1.0, 1.0], combine, thin, "inverse", dtype, 1000) for kind in (Dare, TaskVectors)]
    compiled, plain = (run(rule, members, base) for rule in rules)
    assert torch.equal(compiled, plain)


@pytest.mark.parametrize("rows", [1, 2, 3, 6, 7, 32])
def test_sums_are_pairwise(rows):
    x = torch.rand(2, rows * LANES - 5, generator=torch.Generator().manual_seed(rows)).bfloat16()
    exact = x.double().sum(1)
    assert torch.allclose(folded(x).double(), exact, rtol=1e-6)
    assert folded(x).dtype == torch.float32 and folded(x[:, :0]).tolist() == [0, 0]
