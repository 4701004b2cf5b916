"""Merges a stream's jobs into a model directory that appears only when it is complete, and hashes all inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.files.digests import Digests
from distmerge.files.layout import Shard, index_of, lay_out
from distmerge.files.output import Output, refuse_existing
from distmerge.files.sources import DTYPES
from distmerge.files.stream import Job, Stream


class Report(NamedTuple):
    """What is known of a merge once all its tensors are written.

    Attributes:
        notes: the observer's note of each tensor, by the tensor's name.
        outputs: size and SHA-256 of each shard, by file name.
        inputs: size and SHA-256 of each input file, by path.
    """

    notes: dict[str, Any]
    outputs: dict[str, dict[str, Any]]
    inputs: dict[str, dict[str, Any]]


def write_model(
    stream: Stream,
    out: Path,
    identity: str,
    shard_bytes: int,
    close: Callable[[Report], dict[str, bytes]],
    digests: Digests,
) -> Report:
    """Merge all jobs into the directory ``out``, which appears only when it is complete.

    Args:
        identity: a digest of all that the output's bytes depend on. An interrupted merge of the same identity is resumed.
        shard_bytes: the largest amount of data in one shard.
        close: returns the small files to publish, content by name, once all hashes are known.
        digests: hashes everything that is read and written; it may have begun with the inputs already.

    Raises:
        UserError: when ``out`` exists, an input is damaged, or the disk is full or not writable. Nothing is left behind.
    """
    refuse_existing(out)
    jobs = {job.name: job for job in stream.jobs}
    shards = lay_out({job.name: (job.dtype, job.shape) for job in stream.jobs}, shard_bytes)
    shard_of = {name: shard for shard in shards for name in shard.offsets}
    output = Output(out, identity, shards)
    try:
        return write_into(output, stream, jobs, shard_of, close, digests)
    except UserError:
        output.discard()
        raise


def write_into(
    output: Output,
    stream: Stream,
    jobs: dict[str, Job],
    shard_of: dict[str, Shard],
    close: Callable[[Report], dict[str, bytes]],
    digests: Digests,
) -> Report:
    """Merge the jobs that an interrupted merge has not finished into the open output, and publish it.

    Args:
        jobs, shard_of: by the tensor's name.
    """
    shards = output.shards
    stream.run_survey()
    notes = dict(output.done)

    def write(job: Job, offset: int, elements: Tensor) -> None:
        shard = shard_of[job.name]
        at = shard.offsets[job.name] + offset * elements.element_size()
        output.write(shard, at, elements.contiguous().view(torch.uint8).numpy().data)

    ordered = [jobs[name] for shard in shards for name in shard.offsets]
    for batch in stream.batches(ordered):
        left = [job for job in batch if job.name not in output.done]
        if left:
            found = stream.merge(left, write)
            for job in left:
                notes[job.name] = found.get(job.name)
                output.finish(job.name, notes[job.name])
            output.flush()
        hash_batch(digests, output, shard_of, batch)
    hashes = digests.finish()
    ours = {part.name: hashes.pop(output.path / part.name) for part in shards}
    report = Report(notes, ours, {str(path): entry for path, entry in hashes.items()})
    output.publish(index_of(shards) | close(report))
    return report


def hash_batch(digests: Digests, output: Output, shard_of: dict[str, Shard], batch: list[Job]) -> None:
    """Hash the files up to where a batch has read and written them, while those pages are still in memory."""
    ends: dict[Path, int] = {}
    for job in batch:
        shard = shard_of[job.name]
        stop = shard.offsets[job.name] + job.numel * DTYPES[job.dtype].itemsize
        ends[output.path / shard.name] = max(ends.get(output.path / shard.name, 0), stop)
        for source in job.sources:
            for entry in source.stored:
                ends[entry.file] = max(ends.get(entry.file, 0), entry.stop)
    for path, stop in ends.items():
        digests.advance(path, stop)
