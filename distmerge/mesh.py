"""Ranks as (worker, shard): who trains together, who merges together. The only place that makes process groups."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore

from distmerge.config import train as config
from distmerge.errors import UserError
from distmerge.launch.interrupts import REQUEUE
from distmerge.launch.noticeboard import Noticeboard, Silent
from distmerge.launch.ranks import Place
from distmerge.launch.rendezvous import keep_to_loopback, on_one_machine, open_store
from distmerge.launch.watchdog import LEAVE, Watchdog, verdict

T = TypeVar("T")


class Mesh:
    """World = workers x shards, a worker's ranks next to each other.

    Attributes:
        rank, world: this rank among all.
        worker, workers: the replica that this rank belongs to, of how many.
        shard, shards: this rank's part of its worker, of how many.
        peers: process group of the ranks that hold the same shard, one of each worker: merges run here.
        inside: process group of this worker's ranks.
        files: process group of all ranks, on the CPU, for what a thread writes while training goes on: the store's alone.
        device: where this rank computes.
        name: of this expert, where others of the same job train beside it.
        oversubscription: what the ranks share, in words, where there are more of them than devices.
    """

    def __init__(self, section: config.MeshSettings, place: Place, threads: int | None):
        check_world(section.workers, place.world)
        self.rank, self.world, self.local_rank = place.rank, place.world, place.local_rank
        self.workers, self.shards = section.workers, place.world // section.workers
        self.worker, self.shard = divmod(place.rank, self.shards)
        self.device = choose_device(section.device, place)
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # transformers may import deepspeed, which looks once
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // place.local_world))
        self.timeout_seconds, self.name = section.timeout_seconds, place.name
        timeout = timedelta(seconds=section.timeout_seconds)
        if on_one_machine(place):
            keep_to_loopback()
        store = open_store(place, section.timeout_seconds)
        self.board = Noticeboard(store)
        self.watchdog = Watchdog(self, section.watchdog_seconds)
        self.oversubscription = oversubscription(self.device, place)
        # NCCL wants a GPU for each rank; ranks that share one talk over gloo.
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" and self.oversubscription is None else "gloo"
        try:
            dist.init_process_group(
                backend, store=PrefixStore("world", store), rank=self.rank, world_size=self.world, timeout=timeout
            )
        except RuntimeError as error:
            raise UserError(f"the ranks cannot connect to each other: {' '.join(str(error).split())[:300]}") from None
        ranks = [list(range(worker * self.shards, (worker + 1) * self.shards)) for worker in range(self.workers)]
        self.inside = self._group(ranks, timeout)
        self.peers = self._group([list(column) for column in zip(*ranks, strict=True)], timeout)
        self.files: Any = dist.new_group(backend="gloo", timeout=timeout)

    def _group(self, rank_lists: list[list[int]], timeout: timedelta) -> dist.ProcessGroup:
        group, _ = dist.new_subgroups_by_enumeration(rank_lists, timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def shard_axis(self) -> DeviceMesh:
        """This worker's ranks as an axis to shard over."""
        return DeviceMesh.from_group(self.inside, self.device.type, mesh_dim_names=("shard",))

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes what there is one of."""
        return self.rank == 0

    @contextlib.contextmanager
    def raise_on_all_ranks(self, group: Any = None) -> Iterator[None]:
        """A stretch in which a user's error on any rank ends the job on all of them, told once.

        Nothing in the stretch may wait for a rank that could have failed in it. ``group`` holds all ranks, too.
        """
        error: UserError | None = None
        try:
            yield
        except UserError as caught:
            error = caught
        failed: list[bool] = [False] * self.world
        dist.all_gather_object(failed, error is not None, group=group)
        if error is not None and failed.index(True) == self.rank:
            raise error
        if any(failed):
            raise SystemExit(2)

    def first_problem(self, problem: str | None, group: Any = None) -> str | None:
        """The problem of the first rank that has one, on all ranks; a collective. ``group`` holds all ranks, too."""
        if self.world == 1:
            return problem
        problems: list[str | None] = [None] * self.world
        dist.all_gather_object(problems, problem, group=group)
        return next((problem for problem in problems if problem), None)

    def lead_first(self, what: str, work: Callable[[], T]) -> T:
        """``work()`` on rank 0, then on the first rank of each node, then on the others, however long each takes.

        For what fills a cache on disk. It waits by looking at the store and not in a collective, which would time out.
        """
        stage = 0 if self.leads else 1 if self.local_rank == 0 else 2
        first_ranks = self._count_of_nodes()
        if stage >= 1:
            self._wait(what, 0, 1)
        if stage == 2:
            self._wait(what, 1, first_ranks - 1)
            return work()
        try:
            with self._beating(what):
                return work()
        finally:
            self.board.ask(lambda store: store.add(f"{what}/{stage}", 1), self.timeout_seconds)

    def _count_of_nodes(self) -> int:
        local_ranks: list[int] = [0] * self.world
        dist.all_gather_object(local_ranks, self.local_rank)
        return max(1, local_ranks.count(0))

    @contextlib.contextmanager
    def _beating(self, what: str) -> Iterator[None]:
        """Time in which this rank shows the others that wait for it that it lives."""
        done = threading.Event()

        def beat() -> None:
            with contextlib.suppress(Silent):
                while not done.wait(1.0):
                    self.board.ask(lambda store: store.add(f"{what}/beats", 1), self.timeout_seconds)

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _wait(self, what: str, stage: int, count: int) -> None:
        """Until ``count`` ranks of a stage are done; for as long as somebody shows that it lives."""
        beats, since = -1, time.monotonic()
        while True:
            done, now = self.board.ask(
                lambda store: (store.add(f"{what}/{stage}", 0), store.add(f"{what}/beats", 0)), self.timeout_seconds
            )
            if done >= count:
                return
            if now != beats:
                beats, since = now, time.monotonic()
            if time.monotonic() - since > self.timeout_seconds:
                raise Silent(f"no rank that prepares {what} showed that it lives within {self.timeout_seconds:g} s")
            time.sleep(0.05)

    def name_dead_peers(self, error: RuntimeError) -> BaseException:
        """What to raise for an error of the training: with the ranks' names, if peers died, stopped or were late."""
        text = str(error).lower()
        lost = isinstance(error, (dist.DistError, Silent))
        if not lost and not any(word in text for word in ("gloo", "nccl", "connection")):
            return error
        said = verdict(self, waited="timed out" in text or isinstance(error, Silent))
        if said is None:
            return error
        if said:
            print(f"error: {said}; start the same command again to resume", file=sys.stderr)
        return SystemExit(1 if said else self._status_of_leaving())

    def _status_of_leaving(self) -> int:
        """The exit status of a rank that failed because the others were told to leave, or were ended by their watchdogs."""
        with contextlib.suppress(Silent):
            number = self.board.ask(lambda store: int(store.get(LEAVE)) if store.check([LEAVE]) else 0, 5.0)
            return REQUEUE if number in (signal.SIGTERM, signal.SIGUSR1) else 128 + number if number else 1
        return 1

    def check_same(self, what: str, digest: torch.Tensor) -> None:
        """All ranks of all workers hold the same bits."""
        theirs = [torch.empty_like(digest.reshape(1)) for _ in range(self.world)]
        dist.all_gather(theirs, digest.reshape(1))
        assert all(torch.equal(other, theirs[0]) for other in theirs), f"the ranks differ in {what}"

    def close(self) -> None:
        self.watchdog.stop()
        self.board.close()
        dist.destroy_process_group()


def alone() -> dist.ProcessGroup:
    """A process group of this rank alone; made by all ranks together."""
    group, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(dist.get_world_size())])
    assert isinstance(group, dist.ProcessGroup)
    return group


def check_world(workers: int, world: int) -> None:
    if world % workers:
        raise UserError(f"config.mesh.workers must divide the number of ranks, {world}, got {workers}")


def choose_device(device: str, place: Place) -> torch.device:
    """A GPU of one's own, or a shared one where CUDA is asked for, or the CPU."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus < place.local_world):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError('config.mesh.device must be "auto" or "cpu" on a machine without a CUDA GPU, got "cuda"')
    chosen = torch.device("cuda", place.local_rank % gpus)
    torch.cuda.set_device(chosen)
    return chosen


def oversubscription(device: torch.device, place: Place) -> str | None:
    """What the ranks of this machine share, where they have to: a simulation of many workers on few devices."""
    cores = len(os.sched_getaffinity(0))
    have = torch.cuda.device_count() if device.type == "cuda" else cores
    if place.local_world <= have:
        return None
    kind = "GPUs" if device.type == "cuda" else "cores"
    return (
        f"{place.local_world} ranks share {have} {kind}: losses and bytes are those of {place.local_world}, times mean nothing"
    )
