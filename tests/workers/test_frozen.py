"""Parameters that do not train: they never merge, and are the same on all workers from the start."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

import distmerge as dm
from tests.ranks import Ranks


def frozen_apart() -> tuple[bool, bool]:
    """Whether all workers hold the first one's frozen parameters once a merger is made, and whether they merge to one model."""
    torch.manual_seed(dist.get_rank())
    base, head = nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 1)
    model = nn.Sequential(base, head)
    first = base.weight.clone()
    dist.broadcast(first, 0)
    merger = dm.DiLoCo(model, every=1)
    equal = torch.equal(base.weight, first)
    with torch.no_grad():
        head.weight.add_(dist.get_rank())
    merger.step()
    found = [torch.empty(1) for _ in range(dist.get_world_size())]
    dist.all_gather(found, model(torch.ones(3)).detach())
    return equal, len({float(value) for value in found}) == 1


def test_frozen_parameters_start_equal(ranks: Ranks) -> None:
    assert ranks.run(3, frozen_apart) == [(True, True)] * 3
