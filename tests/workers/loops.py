"""What the tests of mergers train: small modules, a data stream for each worker, and a user's own loop around a merger."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmerge as dm
from tests.spy import counted

STEPS = 11
"""Not a multiple of most values of ``every``, so that finish() has a tail to merge."""


class Deep(nn.Module):
    """143 parameters, in tensors of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(7, 13), nn.Linear(13, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def build(kind: str) -> nn.Module:
    match kind:
        case "deep":
            return Deep()
        case "one":
            return nn.Linear(1, 1, bias=False)
        case "wide":  # 90,601 parameters: more than one cache-sized piece
            return nn.Linear(300, 301)
        case "norm":
            return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    raise AssertionError(kind)


def inner(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    """Each worker at each step has data of its own."""
    first = next(model.parameters())
    x = torch.randn(4, first.shape[1], generator=torch.Generator().manual_seed(1000 * rank + step)).to(first.dtype)
    return (model(x) - x.sum(1, keepdim=True)).float().square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, rank, step).backward()
    optimizer.step()


def vector_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


def run_diloco(kind: str, options: dict[str, Any], optimizer_name: str = "adamw", steps: int = STEPS) -> dict[str, Any]:
    """A user's own loop, from weights that differ between the ranks until the merger is made."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = build(kind)
    merger = dm.DiLoCo(model, **options)
    optimizer = inner(optimizer_name, model)
    reports = []
    with counted() as traffic:
        for step in range(steps):
            train(model, optimizer, rank, step)
            reports.append(merger.step())
        before_finish = vector_of(model)
        reports.append(merger.finish())
    return {
        "theta": vector_of(model),
        "before_finish": before_finish,
        "anchor": merger.anchor,
        "reports": reports,
        "traffic": (traffic.collectives, traffic.bytes_sent),
        "ledger": (merger.workers.ledger.collectives, merger.bytes_sent),
    }
