"""Merges a window: the blocks of a run, or other checkpoints of one model, by a curve or by a rule of the catalogue.

The merge is streamed, and each value is rounded once. The result is published by one rename, with a merge.json that records the
inputs and how they were merged.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distmerge.files.digests import Digests
from distmerge.files.header import FLOATS
from distmerge.files.models import TOKENIZER_FILES, Model, recorded_files
from distmerge.files.output import RECORD, refuse_existing
from distmerge.files.publish import Report, write_model
from distmerge.files.sources import Maps, OnDisk
from distmerge.files.stream import Job, Settings, Stream, Survey, check_device
from distmerge.merging.models import open_any
from distmerge.rules.mean import WeightedMean
from distmerge.windows import advice
from distmerge.windows.by_rule import rule_jobs
from distmerge.windows.curvature import Curvature, newest_curvature
from distmerge.windows.curves import effective_count, implied_curve, token_shares, weights
from distmerge.windows.members import Member, check_alike, chosen, dtype_of, find_members, is_parameter, merged_buffer
from distmerge.windows.options import ByCurve, ByRule, WindowOptions

SHARD_BYTES = 5 * 10**9
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""The name of each dtype in a model's configuration, by its name in safetensors."""


@dataclass(frozen=True)
class WindowResult:
    """The result of merging a window.

    Attributes:
        members: the names of the members, oldest first.
        way: the curve or the rule by which they were merged.
        base: the name of the model that a rule's task vectors start from, if there is one.
        weights: the members' weights in the mean; None for a merge by a rule.
        effective_count: ``1 / sum c^2`` of the weights: the number of members whose plain mean would reduce noise as much.
        advice: whether merging should help here and why, in paragraphs; empty unless it was asked for.
        out: the merged model's directory, if one was written.
    """

    members: tuple[str, ...]
    way: str
    base: str | None = None
    weights: tuple[float, ...] | None = None
    effective_count: float | None = None
    advice: tuple[str, ...] = ()
    out: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "members": list(self.members),
            "way": self.way,
            "base": self.base,
            "weights": None if self.weights is None else list(self.weights),
            "effective_count": self.effective_count,
            "advice": list(self.advice),
            "out": None if self.out is None else str(self.out),
        }

    def __str__(self) -> str:
        lines = list(self.advice)
        if self.out is not None:
            start = "" if self.base is None else f" from {self.base}"
            count = "" if self.effective_count is None else f", N_eff {self.effective_count:.1f}"
            lines.append(f"{self.out}: {len(self.members)} merged by {self.way}{start}{count}")
        return "\n".join(lines)


@dataclass(frozen=True)
class WindowMerge:
    """A window that is ready to be merged.

    Attributes:
        jobs: one per tensor of the output.
        record: what merge.json says besides the hashes of inputs and outputs.
        models: every model that the jobs read.
        survey: what must be measured before the merge, if the rule needs it.
    """

    jobs: list[Job]
    record: dict[str, Any]
    models: list[Model]
    survey: Survey | None = None


def merge_window(
    references: list[str], way: ByCurve | ByRule, options: WindowOptions, out: Path | None = None,
    explain: bool = False, plot: Path | None = None,
) -> WindowResult:  # fmt: skip
    """Merge a window, explain it, plot it: whichever of these is asked for.

    Args:
        references: one run directory, or models, oldest first.
        out: the merged model's directory, which must not exist yet; None to write none.
        explain: whether to say if merging should help here, and why.
        plot: a .svg, .png or .pdf file for the weights, the learning-rate curve that they imply and the frequency response.

    Raises:
        UserError: for anything wrong with the members, the curve or rule, or the disk.
    """
    check_device(options.device)
    torch.set_num_threads(1)  # the stream's own threads share the work
    if out is not None:
        refuse_existing(out)
    members = chosen(find_members(references, options.allow_pickle), options.last, options.steps)
    check_alike([member.model for member in members])
    maps = Maps()
    if isinstance(way, ByRule):
        return merge_by_rule(members, way, options, out, advise(references, members, maps) if explain else (), maps)
    shares = token_shares([member.start for member in members], members[-1].end).tolist()
    c: list[float] = weights(way.curve, shares, way.quadrature).tolist()
    advised = advise(references, members, maps) if explain else ()
    if plot is not None:
        from distmerge.windows.plot import plot as draw

        draw(c, shares, plot, way.name)
    if out is not None:
        jobs = [curve_job(name, members, c, maps, options.dtype) for name in members[0].model.tensors]
        models = [member.model for member in members]
        write(out, members, WindowMerge(jobs, curve_record(members, way, c, shares), models), options)
    names = tuple(member.name for member in members)
    return WindowResult(names, way.name, None, tuple(c), effective_count(c), advised, out)


def merge_by_rule(
    members: list[Member], way: ByRule, options: WindowOptions, out: Path | None, advised: tuple[str, ...], maps: Maps
) -> WindowResult:
    """Merge a window by a rule of the catalogue, see :func:`merge_window`."""
    base = None if way.base is None else open_any(way.base, options.allow_pickle)
    if base is not None:
        check_alike([base, *(member.model for member in members)])
    jobs, survey, base, rest = rule_jobs(members, base, way, maps, options.dtype)
    if out is not None:
        record = {
            "tool": "distmerge",
            "verb": "window",
            "rule": way.rule,
            "compat": way.compat or "paper",
            "seed": way.seed or 0,
            "parameters": dict(way.parameters),
            "base": None if base is None else base.reference,
            "positions": {member.model.reference: member.start for member in rest},
        }
        models = [*([] if base is None else [base]), *(member.model for member in rest)]
        write(out, members, WindowMerge(jobs, record, models, survey), options)
    names = tuple(member.name for member in rest)
    return WindowResult(names, way.rule, None if base is None else base.path.name, advice=advised, out=out)


def curve_record(members: list[Member], way: ByCurve, c: list[float], shares: list[float]) -> dict[str, Any]:
    """What merge.json says about a merge by a curve."""
    table = implied_curve(np.array(c), shares)
    return {
        "tool": "distmerge",
        "verb": "window",
        "curve": way.name,
        "quadrature": way.quadrature,
        "weights": {member.model.reference: weight for member, weight in zip(members, c, strict=True)},
        "positions": {member.model.reference: member.start for member in members},
        "implied_schedule": list(zip(table.x.tolist(), table.d.tolist(), strict=True)),
        "effective_count": effective_count(c),
    }


def write(out: Path, members: list[Member], window: WindowMerge, options: WindowOptions) -> None:
    """Merge a window and publish the result as a model directory."""
    newest = members[-1].model
    dtype = None if options.dtype is None else DTYPES[options.dtype]

    def close(report: Report) -> dict[str, bytes]:
        small = newest.carried(("generation_config.json", *TOKENIZER_FILES))
        if newest.config:
            small["config.json"] = as_json(newest.config | ({"dtype": dtype} if dtype else {}))
        return small | {RECORD: as_json(window.record | {"inputs": report.inputs, "outputs": report.outputs})}

    settings = Settings(options.thread_count, options.chunk, options.device)
    recorded = recorded_files(window.models)
    with Stream(window.jobs, settings, window.survey) as stream, closing(Digests(settings.threads, recorded)) as digests:
        write_model(stream, out, identity(window.record, window.models, options.dtype), SHARD_BYTES, close, digests)


def curve_job(name: str, members: list[Member], c: list[float], maps: Maps, dtype: str | None) -> Job:
    """The job of one tensor: a parameter's weighted mean, or a buffer by its policy."""
    entries = [member.model.tensors[name] for member in members]
    if not is_parameter(entries):
        return merged_buffer(name, entries, maps)
    sources = tuple(OnDisk(entry, maps) for entry in entries)
    return Job(name, entries[0].shape, dtype_of(entries, dtype), WeightedMean(c, normalize=False), sources)


def advise(references: list[str], members: list[Member], maps: Maps) -> tuple[str, ...]:
    """The advice in paragraphs: by plain distances and, if a checkpoint of the run has the curvature, by distances weighted
    with that."""
    starts, end, names = [member.start for member in members], members[-1].end, [member.name for member in members]
    found = [advice.explain(advice.advise(gram(members, maps), starts, end), names)]
    curvature = newest_curvature(Path(references[0]))
    floats = {name for name, entry in members[0].model.tensors.items() if entry.dtype in FLOATS}
    if curvature is not None and curvature.mean > 0 and floats <= curvature.diagonal.keys():
        found.append(f"with distances weighted by the curvature (Adam's second moments in {curvature.source}):")
        found.append(advice.explain(advice.advise(gram(members, maps, curvature), starts, end), names))
    return tuple(found)


def gram(members: list[Member], maps: Maps, curvature: Curvature | None = None) -> np.ndarray:
    """The members' ``[n, n]`` Gram matrix, from one streaming pass over the floating-point tensors.

    Args:
        curvature: to weight squared distances with, scaled to mean 1.
    """
    total = np.zeros((len(members), len(members)))
    for name, entry in members[0].model.tensors.items():
        if entry.dtype in FLOATS:
            sources = [OnDisk(member.model.tensors[name], maps) for member in members]
            for start in range(0, entry.numel, 1 << 18):
                stop = min(start + (1 << 18), entry.numel)
                weights = None if curvature is None else curvature.diagonal[name][start:stop] / curvature.mean
                total += advice.gram_of_chunk([source.read(start, stop) for source in sources], weights)
    return total


def identity(record: dict[str, Any], models: list[Model], dtype: str | None) -> str:
    """A hash of everything that the output depends on. An interrupted merge is resumed only if it has the same."""
    files = [file for model in models for file in model.files]
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([record, dtype, stats], sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
