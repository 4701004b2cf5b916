"""Exchanges that a thread runs while training goes on: the same bits, whatever else travels over the same group meanwhile."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmerge as dm
from distmerge.workers.background import StageThread
from tests.ranks import Ranks

WIRES: list[dict[str, Any]] = [{"wire": "fp32"}, {"wire": "int8"}, {"wire": "int4", "error_feedback": True}]


@torch.no_grad()
def trained(settings: dict[str, Any], threaded: bool, fragments: int = 2) -> Tensor:
    """The parameters after 30 steps of DiLoCo with overlap, while SPARTA's quantised exchanges travel over the same group."""
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 7))
    outer = dm.DiLoCo(model, every=10, overlap=4, fragments=fragments, bucket_bytes=80_000, **settings)
    assert outer.reducer.thread is not None
    if not threaded:
        outer.reducer.thread = None
    merger = dm.compose(dm.SPARTA(model, fraction=0.2, every=1, delay=3, wire="int8"), outer)
    for _ in range(30):
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
        merger.step()
    merger.finish()
    return outer.flat.vector.clone()


@pytest.mark.parametrize("settings", WIRES, ids=lambda settings: settings["wire"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_thread_changes_no_bit(ranks: Ranks, world: int, settings: dict[str, Any]) -> None:
    expected = ranks.run(world, trained, settings, False)
    for _ in range(3):
        found = ranks.run(world, trained, settings, True)
        assert all(torch.equal(one, expected[0]) for one in (*found, *expected))


def failing() -> Iterator[None]:
    yield
    raise RuntimeError("the network is gone")


def test_what_a_stage_raises_is_raised_where_the_result_is_waited_for() -> None:
    thread = StageThread()
    job = thread.begin(failing())
    job.wait_for_first()
    with pytest.raises(RuntimeError, match="the network is gone"):
        job.wait()
    other = thread.begin(iter([None]))
    other.wait()  # the thread goes on with other jobs


ABANDONING = """
import torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn
import distmerge as dm

def rank(rank, path):
    dist.init_process_group("gloo", f"file://{path}", rank=rank, world_size=2)
    model = nn.Linear(500, 500)
    merger = dm.DiLoCo(model, every=2, overlap=1, wire="int8")
    for _ in range(4):
        merger.step()

if __name__ == "__main__":
    import sys
    mp.spawn(rank, (sys.argv[1],), nprocs=2)
"""


def test_a_process_that_leaves_in_the_middle_of_a_round_leaves_with_status_0(tmp_path: Any) -> None:
    """Python aborts a process that ends while a thread is inside torch."""
    script = tmp_path / "abandoning.py"
    script.write_text(ABANDONING)
    for attempt in range(3):
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / f"rendezvous-{attempt}")], capture_output=True, text=True, timeout=300
        )
        assert (done.returncode, done.stderr) == (0, "")


@torch.no_grad()
def loaded_in_flight(settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The end of a merger whose state is loaded back while another fragment is in flight, and of one that just went on."""
    ends: list[Tensor] = []
    for goes_back in (True, False):
        torch.manual_seed(dist.get_rank())
        model = nn.Linear(300, 300)
        merger = dm.DiLoCo(model, every=3, overlap=2, outer_lr=0.7, outer_momentum=0.5, **settings)
        drifts = [0.01 * torch.randn_like(merger.flat.vector) for _ in range(12)]

        def train(merger: dm.DiLoCo, drifts: list[Tensor]) -> None:
            for drift in drifts:
                merger.flat.vector.add_(drift)
                merger.step()

        train(merger, drifts[:7])
        state, theta = copy.deepcopy(merger.state_dict()), merger.flat.vector.clone()
        if goes_back:
            train(merger, drifts[:3])  # a fragment was sent at the last of these steps
            merger.load_state_dict(state)
            merger.flat.vector.copy_(theta)
        train(merger, drifts[7:])
        merger.finish()
        ends.append(merger.flat.vector.clone())
    return ends[0], ends[1]


@pytest.mark.parametrize("settings", WIRES, ids=lambda settings: settings["wire"])
def test_a_state_is_loaded_while_a_fragment_is_in_flight(ranks: Ranks, settings: dict[str, Any]) -> None:
    for went_back, went_on in ranks.run(2, loaded_in_flight, settings):
        assert torch.equal(went_back, went_on)
