"""Applies a merge rule to model files chunk by chunk, so that no model is ever in memory as a whole.

Jobs, one per tensor, are taken in batches in the order of the output. A rule makes as many passes over a batch's blocks as it
needs, then the batch is written; threads share the blocks. The bytes of a job's output depend on the job alone, not on the
batch, the chunk size or the number of threads.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.files.allocator import keep_freed_memory
from distmerge.files.rounding import Rounding
from distmerge.files.sources import DTYPES, Source
from distmerge.rules.protocol import BLOCK, Block, Measured, Rule, Tally, spans

BATCH_BLOCKS = 128
"""Jobs are batched until they have this many blocks: enough for all threads, and few enough to stay in the page cache."""

CUDA_BLOCK = 1 << 24


@dataclass(frozen=True)
class Job:
    """One tensor of the output: its inputs, the rule that merges them, and the dtype in which it is stored.

    Attributes:
        dtype: safetensors' name of the output's dtype.
        members: the tensors that are merged, each of the output's shape.
        base: what the rule's task vectors start from; None for rules without task vectors.
        origin: what an observer's task vectors start from where the rule has no base.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: Rule
    members: tuple[Source, ...]
    base: Source | None = None
    origin: Source | None = None

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())

    @property
    def sources(self) -> tuple[Source, ...]:
        return (*self.members, *(source for source in (self.base, self.origin) if source is not None))


class Survey(Protocol):
    """Measures the whole model before any tensor is merged, for instance to find a global threshold."""

    def measure(self, job: Job, block: Block) -> Measured: ...

    def settle(self, tally: Tally) -> bool:
        """End a pass over all jobs. Returns False if another pass is needed."""
        ...


class Observer(Protocol):
    """Measures each block as it is merged, and makes a note of each tensor (statistics for the merge's report)."""

    def measure(self, job: Job, block: Block, merged: Tensor, written: Tensor) -> Measured:
        """Measure one block.

        Args:
            block: its ``base`` is the job's origin where the job has no base.
            merged: the rule's result ``[n]``, in the arithmetic's dtype.
            written: the same, rounded to the stored dtype.
        """
        ...

    def settle(self, job: Job, tally: Tally) -> Any:
        """The note of one tensor, a JSON value, from what its blocks measured."""
        ...


@dataclass(frozen=True)
class Settings:
    """How a merge runs. Only ``device`` can change the bytes of the output.

    Attributes:
        threads: how many threads merge.
        chunk: elements that a thread takes at a time, rounded up to whole blocks.
        device: where the arithmetic is done: "cpu", or a CUDA device as torch names it.
    """

    threads: int = field(default_factory=lambda: len(os.sched_getaffinity(0)))
    chunk: int = 1 << 20
    device: str = "cpu"

    @property
    def block(self) -> int:
        return BLOCK if self.device == "cpu" else CUDA_BLOCK


class Stream:
    """Runs jobs on threads, which exist while it is entered as a context manager."""

    def __init__(self, jobs: list[Job], settings: Settings, survey: Survey | None = None, observer: Observer | None = None):
        self.jobs, self.settings, self.survey, self.observer = jobs, settings, survey, observer
        self.rounding = Rounding()
        self._stop = threading.Event()

    def __enter__(self) -> Stream:
        keep_freed_memory()
        self._pool = ThreadPoolExecutor(self.settings.threads, thread_name_prefix="merge")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._pool.shutdown(cancel_futures=True)

    def run_survey(self) -> None:
        """Run the survey's passes over all jobs, as many as it needs."""
        settled = self.survey is None
        while not settled:
            assert self.survey is not None
            tally = Tally()
            for batch in self.batches(self.jobs):
                self._survey_batch(self.survey, batch, tally)
            settled = self.survey.settle(tally)

    def _survey_batch(self, survey: Survey, batch: list[Job], tally: Tally) -> None:
        lock = threading.Lock()

        def task(job: Job, part: range) -> None:
            for block in self.blocks(job, part):
                measured = survey.measure(job, block)
                with lock:
                    tally.add(block.index, measured)

        self._run(task, batch)

    def batches(self, jobs: list[Job]) -> Iterator[list[Job]]:
        """The jobs in groups of about ``BATCH_BLOCKS`` blocks; a larger job is a batch of its own."""
        batch: list[Job] = []
        filled = 0
        for job in jobs:
            if batch and filled + job.numel > BATCH_BLOCKS * self.settings.block:
                yield batch
                batch, filled = [], 0
            batch.append(job)
            filled += job.numel
        if batch:
            yield batch

    def merge(self, batch: list[Job], write: Callable[[Job, int, Tensor], None]) -> dict[str, Any]:
        """Merge the jobs of one batch.

        Args:
            write: called with the job, the offset in the flattened tensor and the block's rounded elements, from any thread.

        Returns:
            the observer's note of each job, by the tensor's name; {} without an observer.
        """
        states: dict[str, Any] = {job.name: None for job in batch}
        for step in range(max(job.rule.passes for job in batch)):
            asked = [job for job in batch if step < job.rule.passes and job.numel]  # an empty tensor has nothing to measure
            tallies = self._tallied(asked, lambda job, block, step=step: job.rule.measure(step, block, states[job.name]))
            for job in asked:
                states[job.name] = job.rule.settle(step, tallies[job.name], states[job.name])
        tallies = self._tallied(batch, lambda job, block: self._merge_block(job, block, states[job.name], write))
        if self.observer is None:
            return {}
        return {job.name: self.observer.settle(job, tallies[job.name]) for job in batch}

    def _merge_block(self, job: Job, block: Block, state: Any, write: Callable[[Job, int, Tensor], None]) -> Measured:
        try:
            merged = job.rule.merge(block, state)
        except ValueError as error:
            raise UserError(f"{job.name} {error}") from None
        rounded = self.rounding.to(DTYPES[job.dtype], merged, job.name, block.start)
        for values in (rounded, *block.members) if job.rule.hides(state) else (rounded,):
            if values.is_floating_point() and not bool(torch.isfinite(values.sum(dtype=wide(values)))):
                self._blame(job, block, rounded)
        write(job, block.start, rounded.cpu())
        if self.observer is None:
            return Measured()
        if job.base is None and job.origin is not None:
            block = replace(block, base=job.origin.read(block.start, block.start + merged.numel()).to(merged.device))
        return self.observer.measure(job, block, merged, rounded)

    def _blame(self, job: Job, block: Block, rounded: Tensor) -> None:
        """Raise an error that names the input with a NaN or infinity, or says that the output overflows.

        It may find neither: the sum by which the caller checks can overflow although all values are finite.
        """
        for source, values in zip(job.sources, (*block.members, block.base), strict=False):
            if values is not None and not bool(torch.isfinite(values).all()):
                files = ", ".join(str(entry.file) for entry in source.stored)
                raise UserError(f"{job.name} holds NaN or infinity in {files}")
        if not bool(torch.isfinite(rounded).all()):
            raise UserError(f"{job.name} would hold NaN or infinity in the output: it overflows {str(rounded.dtype)[6:]}")

    def _tallied(self, jobs: list[Job], measure: Callable[[Job, Block], Measured]) -> dict[str, Tally]:
        """Measure every block of the jobs. Returns what each job's blocks measured, by the tensor's name."""
        tallies = {job.name: Tally() for job in jobs}
        lock = threading.Lock()

        def task(job: Job, part: range) -> None:
            for block in self.blocks(job, part):
                measured = measure(job, block)
                with lock:
                    tallies[job.name].add(block.index, measured)

        self._run(task, jobs)
        return tallies

    def _run(self, task: Callable[[Job, range], None], jobs: list[Job]) -> None:
        """Run ``task`` for every chunk of every job on the threads. The first error cancels the rest and is raised."""
        futures = [self._pool.submit(self._guarded, task, job, part) for job in jobs for part in self.chunks(job)]
        try:
            for future in futures:
                future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def _guarded(self, task: Callable[[Job, range], None], job: Job, part: range) -> None:
        if not self._stop.is_set():
            with torch.inference_mode():
                task(job, part)

    def chunks(self, job: Job) -> Iterator[range]:
        """The job's blocks, by index, in chunks for the threads."""
        count = len(self.spans(job))
        size = -(-self.settings.chunk // self.settings.block)
        for first in range(0, count, size):
            yield range(first, min(first + size, count))

    def spans(self, job: Job) -> list[tuple[int, int]]:
        """Start and stop of each of the job's blocks, in elements of the flattened tensor."""
        return list(spans(job.numel, job.rule.unit, self.settings.block))

    def blocks(self, job: Job, part: range) -> Iterator[Block]:
        """Read the blocks with the indices ``part`` onto the device."""
        device = self.settings.device
        cuts = self.spans(job)
        for index in part:
            start, stop = cuts[index]
            members = [source.read(start, stop).to(device) for source in job.members]
            base = job.base.read(start, stop).to(device) if job.base is not None else None
            yield Block(members, base, start, index)


def wide(values: Tensor) -> torch.dtype:
    """A dtype in which the values' sum does not overflow merely because there are many of them."""
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device must be cpu on this machine, where no CUDA device is present, got {device}")


def in_memory(stream: Stream, keep: Callable[[Job, int, Tensor], None]) -> dict[str, Any]:
    """Merge all jobs and pass every block to ``keep`` instead of writing a file. Returns the observer's notes."""
    stream.run_survey()
    return {name: note for batch in stream.batches(stream.jobs) for name, note in stream.merge(batch, keep).items()}
