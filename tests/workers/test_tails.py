"""How a run ends: with the mean of the workers where a round was begun, with the anchor where none was."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distmerge as dm
from tests.ranks import Ranks
from tests.workers.loops import run_diloco
from tests.workers.test_streaming import build, train

PAPER = {"outer_lr": 0.7, "outer_momentum": 0.9}
STREAMING = {"fragments": 2, "overlap": 1, "mix": 0.5, "wire": "int4", "error_feedback": True, "outer_lr": 0.4}


def ended(settings: dict[str, Any], steps: int) -> dict[str, Any]:
    model = build("blocks")
    merger = dm.DiLoCo(model, every=6, **settings)
    train(model, [merger], steps)
    before = merger.flat.vector.clone()
    report = merger.finish()
    after = merger.flat.vector.clone()
    anchor = None if merger.anchor is None else merger.anchor.clone()
    again = merger.finish()
    same = torch.equal(after, merger.flat.vector)
    return {"before": before, "after": after, "anchor": anchor, "report": report, "again": again, "same": same}


@pytest.mark.parametrize("steps", [12, 13, 15])
@pytest.mark.parametrize(
    "settings",
    [
        PAPER,
        STREAMING,
        {"mix": 0.5},
        {"overlap": 3},
        {"fragments": 3, "wire": "int8"},
        {"outer_sharded": True, "fragments": 2, "overlap": 1, "mix": 0.5},
        {"rule": "radial"},
        {"rule": "tokens", "fragments": 2, "mix": 0.25},
    ],
    ids=str,
)
def test_a_run_ends_with_the_mean_of_its_workers(ranks: Ranks, settings: dict, steps: int) -> None:
    """No outer step for a part of a round, none for an empty one; whatever the wire, in float32."""
    results = ranks.run(2, ended, settings, steps)
    mean = torch.stack([result["before"] for result in results]).double().mean(0).float()
    for result in results:
        torch.testing.assert_close(result["after"], mean, rtol=0, atol=1e-6)
        assert torch.equal(result["after"], results[0]["after"])
        assert result["anchor"] is None or torch.equal(result["anchor"], result["after"])
        assert result["again"] is None and result["same"]


def test_whole_rounds_end_with_the_anchor(ranks: Ranks) -> None:
    for result in ranks.run(2, ended, PAPER, 12):
        assert result["report"] is None
        assert torch.equal(result["after"], result["before"]) and torch.equal(result["after"], result["anchor"])


@torch.no_grad()
def judged(merger: dm.DiLoCo, model: torch.nn.Module) -> dict[str, float]:
    """Held-out losses of the anchor, the mean and what finish() makes; the merger is left as it was."""
    theta, own, state = merger.flat.vector, merger.flat.vector.clone(), copy.deepcopy(merger.state_dict())
    assert merger.anchor is not None
    vectors: dict[str, Tensor] = {"anchor": merger.anchor.clone(), "mean": own.clone()}
    dist.all_reduce(vectors["mean"])
    vectors["mean"] /= dist.get_world_size()
    merger.finish()
    vectors["final"] = theta.clone()
    x = torch.randn(512, 5, generator=torch.Generator().manual_seed(99))
    losses = {}
    for name, vector in vectors.items():
        theta.copy_(vector)
        losses[name] = target_loss(model, x).item()
    theta.copy_(own)
    merger.load_state_dict(state)
    return losses


def target_loss(model: torch.nn.Module, x: Tensor) -> Tensor:
    return (model(x) - torch.sin(2 * x[:, :3])).square().mean()


def tails(settings: dict[str, Any], seed: int, every: int, lengths: list[int]) -> list[dict[str, float]]:
    """What the final model would lose at each length of the tail after six rounds: one run serves them all."""
    model = build("blocks")
    merger = dm.DiLoCo(model, every=every, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    found = []
    for step in range(1, 6 * every + max(lengths) + 1):
        target_loss(model, torch.randn(16, 5, generator=draw)).backward()
        optimizer.step()
        optimizer.zero_grad()
        merger.step()
        if step - 6 * every in lengths:
            found.append(judged(merger, model))
    return found


@pytest.mark.parametrize("settings", [{}, STREAMING | {"outer_momentum": 0.9}], ids=["defaults", "streaming"])
def test_a_tail_does_not_make_the_model_worse_than_anchor_and_mean(ranks: Ranks, settings: dict) -> None:
    """At full size: benchmarks/tails.py."""
    lengths = [0, 1, 2, 5, 9]
    runs = [ranks.run(2, tails, settings, seed, 10, lengths)[0] for seed in range(3)]
    for at_length in zip(*runs, strict=True):
        worse = [losses["final"] - min(losses["anchor"], losses["mean"]) for losses in at_length]
        assert statistics.mean(worse) <= 2 * statistics.stdev(worse) / len(worse) ** 0.5 + 1e-6


def test_a_tail_of_one_step_moves_by_one_step(ranks: Ranks) -> None:
    """With the paper's momentum an outer step for a tail of one moved the model by a multiple of a whole round."""
    for result in ranks.run(2, run_diloco, "deep", PAPER | {"every": 10}):
        assert (result["theta"] - result["before_finish"]).abs().max() < 0.02  # two steps of AdamW at a rate of 1e-2
