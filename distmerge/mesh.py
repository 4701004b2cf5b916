"""The mesh of ranks, (worker, shard): which ranks train one replica together, and which merge. All process groups are created
here."""

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
from distmerge.launch.noticeboard import Noticeboard, StoreUnreachable
from distmerge.launch.ranks import Place
from distmerge.launch.rendezvous import keep_to_loopback, on_one_machine, open_store
from distmerge.launch.watchdog import STOP_REQUEST, Watchdog, verdict

T = TypeVar("T")


class Mesh:
    """The world has workers x shards ranks. The ranks of a worker are consecutive: rank = worker x shards + shard.

    With 4 ranks and 2 workers, worker 0 has ranks 0 and 1, worker 1 has ranks 2 and 3. ``inside`` is then [0, 1] or [2, 3], and
    ``peers`` is [0, 2] or [1, 3].

    Attributes:
        rank, world: this rank, and the number of ranks.
        worker, workers: this rank's worker, and the number of workers.
        shard, shards: this rank's index in its worker, and the number of ranks per worker.
        peers: process group of the ranks with the same shard, one of each worker. Merges use it.
        inside: process group of this worker's ranks.
        files: process group of all ranks on the CPU, used only by the checkpoint store, whose thread writes during training.
        device: the device on which this rank computes.
        name: name of this expert, if a job trains several side by side.
        oversubscription: a line for the log if there are more ranks than devices, else None.
    """

    def __init__(self, section: config.MeshSettings, place: Place, threads: int | None):
        check_world(section.workers, place.world)
        self.rank, self.world, self.local_rank = place.rank, place.world, place.local_rank
        self.workers, self.shards = section.workers, place.world // section.workers
        self.worker, self.shard = divmod(place.rank, self.shards)
        self.device = choose_device(section.device, place)
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)  # transformers may import deepspeed, which reads it once
        torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // place.local_world))
        self.timeout_seconds, self.name = section.timeout_seconds, place.name
        timeout = timedelta(seconds=section.timeout_seconds)
        if on_one_machine(place):
            keep_to_loopback()
        store = open_store(place, section.timeout_seconds)
        self.board = Noticeboard(store)
        self.watchdog = Watchdog(self, section.watchdog_seconds)
        self.oversubscription = oversubscription(self.device, place)
        # NCCL needs a GPU of its own for each rank; ranks that share GPUs use gloo.
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
        """A device mesh of this worker's ranks, over which FSDP shards."""
        return DeviceMesh.from_group(self.inside, self.device.type, mesh_dim_names=("shard",))

    @property
    def leads(self) -> bool:
        """Whether this is rank 0, which writes the files that a run has once, such as its log."""
        return self.rank == 0

    @contextlib.contextmanager
    def raise_on_all_ranks(self, group: Any = None) -> Iterator[None]:
        """A context in which a UserError on any rank ends the job on all ranks. Only the first rank that failed raises the
        error, so it is reported once; the others raise SystemExit.

        The body must not contain a collective, in which ranks would wait for one that has failed.

        Args:
            group: a process group of all ranks, by default the world.
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
        """The problem of the first rank that has one, returned on all ranks; a collective.

        Args:
            group: a process group of all ranks, by default the world.
        """
        if self.world == 1:
            return problem
        problems: list[str | None] = [None] * self.world
        dist.all_gather_object(problems, problem, group=group)
        return next((problem for problem in problems if problem), None)

    def lead_first(self, what: str, work: Callable[[], T]) -> T:
        """Call ``work()`` on rank 0, then on the first rank of each other node, then on the remaining ranks, so that the later
        ones find a filled cache on disk.

        Ranks wait by polling the notice board, since a collective would time out. They wait as long as the working rank sends
        heartbeats.

        Args:
            what: name of the work, for the notice board and errors.

        Raises:
            StoreUnreachable: without a heartbeat for ``timeout_seconds``.
        """
        stage = 0 if self.leads else 1 if self.local_rank == 0 else 2
        nodes = self._count_nodes()
        if stage >= 1:
            self._wait(what, 0, 1)
        if stage == 2:
            self._wait(what, 1, nodes - 1)
            return work()
        try:
            with self._beating(what):
                return work()
        finally:
            self.board.ask(lambda store: store.add(f"{what}/{stage}", 1), self.timeout_seconds)

    def _count_nodes(self) -> int:
        local_ranks: list[int] = [0] * self.world
        dist.all_gather_object(local_ranks, self.local_rank)
        return max(1, local_ranks.count(0))

    @contextlib.contextmanager
    def _beating(self, what: str) -> Iterator[None]:
        """A context in which this rank sends heartbeats to the ranks that wait for it."""
        done = threading.Event()

        def beat() -> None:
            with contextlib.suppress(StoreUnreachable):
                while not done.wait(1.0):
                    self.board.ask(lambda store: store.add(f"{what}/beats", 1), self.timeout_seconds)

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            done.set()

    def _wait(self, what: str, stage: int, count: int) -> None:
        """Wait until ``count`` ranks of a stage are done, as long as there are heartbeats."""
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
                raise StoreUnreachable(f"no heartbeat from a rank that prepares {what} for {self.timeout_seconds:g} s")
            time.sleep(0.05)

    def explain_lost_ranks(self, error: RuntimeError) -> BaseException:
        """The exception to raise in place of an error during training: if other ranks have died, hang or were late, print
        which, and return a SystemExit. Other errors are returned as they are."""
        text = str(error).lower()
        lost = isinstance(error, (dist.DistError, StoreUnreachable))
        if not lost and not any(word in text for word in ("gloo", "nccl", "connection")):
            return error
        blamed = verdict(self, waited="timed out" in text or isinstance(error, StoreUnreachable))
        if blamed is None:
            return error
        if blamed:
            print(f"error: {blamed}; start the same command again to resume", file=sys.stderr)
        return SystemExit(1 if blamed else self._status_of_stop())

    def _status_of_stop(self) -> int:
        """The exit status of a rank that failed because the job was asked to stop or a watchdog has ended it."""
        with contextlib.suppress(StoreUnreachable):
            number = self.board.ask(lambda store: int(store.get(STOP_REQUEST)) if store.check([STOP_REQUEST]) else 0, 5.0)
            return REQUEUE if number in (signal.SIGTERM, signal.SIGUSR1) else 128 + number if number else 1
        return 1

    def check_same(self, what: str, digest: torch.Tensor) -> None:
        """Assert that a digest is the same on all ranks; a collective.

        Args:
            what: what the digest is taken of, for the error.
            digest: a scalar.
        """
        digests = [torch.empty_like(digest.reshape(1)) for _ in range(self.world)]
        dist.all_gather(digests, digest.reshape(1))
        assert all(torch.equal(other, digests[0]) for other in digests), f"the ranks differ in {what}"

    def close(self) -> None:
        self.watchdog.stop()
        self.board.close()
        dist.destroy_process_group()


def single_rank_group() -> dist.ProcessGroup:
    """A process group of this rank only. All ranks must call it together."""
    group, _ = dist.new_subgroups_by_enumeration([[rank] for rank in range(dist.get_world_size())])
    assert isinstance(group, dist.ProcessGroup)
    return group


def check_world(workers: int, world: int) -> None:
    if world % workers:
        raise UserError(f"config.mesh.workers must divide the number of ranks, {world}, got {workers}")


def choose_device(device: str, place: Place) -> torch.device:
    """The device of this rank: with "auto" a GPU of its own if there are enough, else the CPU; with "cuda" a GPU that ranks may
    share.

    Raises:
        UserError: for "cuda" without a GPU.
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus < place.local_world):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError('config.mesh.device must be "auto" or "cpu" on a machine without a CUDA GPU, got "cuda"')
    chosen = torch.device("cuda", place.local_rank % gpus)
    torch.cuda.set_device(chosen)
    return chosen


def oversubscription(device: torch.device, place: Place) -> str | None:
    """A line for the log if this machine has fewer devices than ranks: such a job simulates many workers on few devices."""
    cores = len(os.sched_getaffinity(0))
    have = torch.cuda.device_count() if device.type == "cuda" else cores
    if place.local_world <= have:
        return None
    kind = "GPUs" if device.type == "cuda" else "cores"
    return f"{place.local_world} ranks share {have} {kind} (oversubscribed): losses and bytes sent are valid, times are not"
