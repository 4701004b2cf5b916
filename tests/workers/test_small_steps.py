"""Progress that no bfloat16 number shows by itself counts in a merge: deltas are taken from what the model was given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import distmerge as dm
from tests.ranks import Ranks


def small_steps(dtype: torch.dtype, rate: float) -> float:
    """How far an anchor of 1.0 went, in units in the last place of bfloat16, in 40 rounds of one unit for every worker."""
    unit = torch.finfo(torch.bfloat16).eps
    model = nn.Linear(1, 1, bias=False).to(dtype)
    torch.nn.init.ones_(model.weight)
    merger = dm.DiLoCo(model, every=1, outer_lr=rate, outer_momentum=0.0)
    for _ in range(40):
        with torch.no_grad():
            model.weight += unit
        merger.step()
    assert merger.anchor is not None
    return (merger.anchor.item() - 1) / unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rate", [0.1, 0.7])  # against the anchor itself, a bfloat16 model went 3.5 and 39.6 units
def test_the_smallest_progress_counts_in_full(ranks: Ranks, rate: float, dtype: torch.dtype) -> None:
    for moved in ranks.run(2, small_steps, dtype, rate):
        assert abs(moved - 40 * rate) < 0.01
