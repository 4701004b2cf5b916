"""A stream's jobs into a directory that appears when it is whole, with the hashes of all that was read and written."""

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
    """Attributes: every tensor's note by the observer; hashes of the outputs, by name, and of the inputs, by path."""

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
    """Merge all jobs into the directory ``out``, which appears when it is whole.

    Args:
        identity: what the bytes depend on; an interrupted merge of the same identity is resumed.
        close: makes the small files, once all hashes are known.
        digests: hash all that is read and written; they may have begun with the inputs.
    """
    refuse_existing(out)
    jobs = {job.name: job for job in stream.jobs}
    shards = lay_out({job.name: (job.dtype, job.shape) for job in stream.jobs}, shard_bytes)
    home = {name: shard for shard in shards for name in shard.offsets}
    output = Output(out, identity, shards)
    try:
        return into(output, stream, jobs, home, close, digests)
    except UserError:
        output.discard()
        raise


def into(
    output: Output,
    stream: Stream,
    jobs: dict[str, Job],
    home: dict[str, Shard],
    close: Callable[[Report], dict[str, bytes]],
    digests: Digests,
) -> Report:
    """The same, once the output is open. ``home`` is the shard of each job."""
    shards = output.shards
    stream.look()
    notes = dict(output.done)

    def write(job: Job, offset: int, elements: Tensor) -> None:
        at = home[job.name].offsets[job.name] + offset * elements.element_size()
        output.write(home[job.name], at, elements.contiguous().view(torch.uint8).numpy().data)

    ordered = [jobs[name] for shard in shards for name in shard.offsets]
    for batch in stream.batches(ordered):
        left = [job for job in batch if job.name not in output.done]
        if left:
            found = stream.merge(left, write)
            for job in left:
                notes[job.name] = found.get(job.name)
                output.finish(job.name, notes[job.name])
            output.flush()
        follow(digests, output, home, batch)
    hashes = digests.finish()
    ours = {part.name: hashes.pop(output.path / part.name) for part in shards}
    report = Report(notes, ours, {str(path): entry for path, entry in hashes.items()})
    output.publish(index_of(shards) | close(report))
    return report


def follow(digests: Digests, output: Output, home: dict[str, Shard], batch: list[Job]) -> None:
    """Let the hashes catch up with what a batch has read and written. Inputs are final; only their pages may be gone."""
    ends: dict[Path, int] = {}
    for job in batch:
        shard = home[job.name]
        stop = shard.offsets[job.name] + job.numel * DTYPES[job.dtype].itemsize
        ends[output.path / shard.name] = max(ends.get(output.path / shard.name, 0), stop)
        for source in job.sources:
            for entry in source.stored:
                ends[entry.file] = max(ends.get(entry.file, 0), entry.stop)
    for path, stop in ends.items():
        digests.advance(path, stop)
