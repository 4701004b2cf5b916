"""The ranks that all other tests stand on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks


def add_ranks(scale: float) -> tuple[int, float]:
    value = torch.tensor(scale * dist.get_rank())
    dist.all_reduce(value)
    return dist.get_rank(), value.item()


def process_id() -> int:
    return os.getpid()


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} has had enough")
    dist.barrier()


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def environment() -> dict[str, str]:
    assert not dist.is_initialized()
    return {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def test_results_come_in_the_order_of_ranks(ranks: Ranks) -> None:
    for world in (2, 3, 4):
        assert ranks.run(world, add_ranks, 2.0) == [(rank, world * (world - 1.0)) for rank in range(world)]


def test_processes_are_kept(ranks: Ranks) -> None:
    assert ranks.run(3, process_id)[:2] == ranks.run(2, process_id)


def test_a_rank_that_raises_is_heard_though_the_others_wait() -> None:
    ranks = Ranks()
    with pytest.raises(ValueError, match="rank 1 has had enough") as caught:
        ranks.run(2, fail_on, 1)
    assert "in rank 1" in caught.value.__notes__[0]
    assert "fail_on" in caught.value.__notes__[0]
    assert ranks.run(2, add_ranks, 1.0) == [(0, 1.0), (1, 1.0)]
    ranks.close()


def test_a_rank_that_never_answers_is_a_timeout() -> None:
    ranks = Ranks()
    with pytest.raises(TimeoutError, match=r"ranks \[0\] of 1 did not answer"):
        ranks.run(1, sleep, 1000.0, seconds=0.5)
    assert not ranks.processes


def test_without_a_group_the_environment_says_the_place(ranks: Ranks) -> None:
    assert ranks.run(2, environment, group=False)[1] == {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
