"""The merge of a window: the blocks of a run, or other checkpoints of one model, by a curve or by a rule of the catalogue.

Streamed, rounded once, published by one rename with a merge.json that says what came from where.
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
"""A dtype's name in safetensors, and in a model's configuration."""


@dataclass(frozen=True)
class WindowResult:
    """What became of a window.

    Attributes:
        members: the names of the members, oldest first.
        way: the curve or the rule by which it was merged.
        base: the name of the model that a rule's task vectors start from, if there is one.
        weights: of the members in the mean, by a curve alone.
        effective_count: ``1 / sum c^2`` of the weights: how many members of equal weight would quiet noise as much.
        advice: whether merging should help here and why, where that was asked for; paragraphs.
        out: the merged model's directory, where one was written.
    """

    members: tuple[str, ...]
    way: str
    base: str | None = None
    weights: tuple[float, ...] | None = None
    effective_count: float | None = None
    advice: tuple[str, ...] = ()
    out: Path | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON has it."""
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
    """A window that is ready to be merged. Attributes: its jobs, what its record says, and every model that they read."""

    jobs: list[Job]
    record: dict[str, Any]
    models: list[Model]
    survey: Survey | None = None


def merge_window(
    references: list[str], way: ByCurve | ByRule, options: WindowOptions, out: Path | None = None,
    explain: bool = False, plot: Path | None = None,
) -> WindowResult:  # fmt: skip
    """Merge a window, explain it, draw it: what is asked for.

    Args:
        references: one run directory, or models, oldest first.
        out: the merged model's directory, which must not exist yet.
        explain: whether to say if merging should help here, and why.
        plot: a .svg, .png or .pdf file for the weights, the learning-rate curve that they imply and the frequency response.

    Raises:
        UserError: for anything wrong with the members, the curve or rule, or the disk.
    """
    check_device(options.device)
    torch.set_num_threads(1)  # ours share the work
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
    """The same by a rule of the catalogue."""
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
    """What merge.json says of a merge by a curve."""
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
    """Merge and publish."""
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
    """The advice by plain distances and, where a checkpoint of the run has one, by the curvature, in paragraphs."""
    starts, end, names = [member.start for member in members], members[-1].end, [member.name for member in members]
    found = [advice.explain(advice.advise(gram(members, maps), starts, end), names)]
    curvature = newest_curvature(Path(references[0]))
    floats = {name for name, entry in members[0].model.tensors.items() if entry.dtype in FLOATS}
    if curvature is not None and curvature.mean > 0 and floats <= curvature.diagonal.keys():
        found.append(f"the same, distances weighed by the curvature (Adam's second moments in {curvature.source}):")
        found.append(advice.explain(advice.advise(gram(members, maps, curvature), starts, end), names))
    return tuple(found)


def gram(members: list[Member], maps: Maps, curvature: Curvature | None = None) -> np.ndarray:
    """One streaming pass over the floating-point tensors."""
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
    """All that the output depends on; an interrupted merge of the same is resumed."""
    files = [file for model in models for file in model.files]
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([record, dtype, stats], sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
