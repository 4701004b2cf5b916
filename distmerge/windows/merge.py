"""``distmerge window``: the blocks of a run, or other checkpoints of one model, merged by a learning-rate curve.

Streamed, summed in float32, rounded once, published by one rename with a merge.json that says what came from where.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from distmerge.errors import UserError
from distmerge.files.convert import as_safetensors, is_foreign, newest_tag
from distmerge.files.digests import Digests
from distmerge.files.header import FLOATS
from distmerge.files.models import TOKENIZER_FILES, Model, open_model, recorded_files
from distmerge.files.output import RECORD, refuse_existing
from distmerge.files.publish import Report, write_model
from distmerge.files.sources import Maps, OnDisk
from distmerge.files.stream import Job, Settings, Stream
from distmerge.rules.mean import WeightedMean
from distmerge.rules.passthrough import Same, Scaled
from distmerge.rundir.identity import read_identity, stranger
from distmerge.theta.buffers import POLICIES
from distmerge.windows import advice
from distmerge.windows.blocks import RECORD as BLOCK_RECORD
from distmerge.windows.blocks import legible, mergeable, published_blocks
from distmerge.windows.curvature import Curvature, newest_curvature
from distmerge.windows.curves import effective_count, implied_curve, token_shares, weights

SHARD_BYTES = 5 * 10**9


class Member(NamedTuple):
    """A checkpoint of the window: its model, its last step (None where unknown), where it begins and ends in tokens."""

    model: Model
    step: int | None
    start: float
    end: float | None

    @property
    def name(self) -> str:
        return self.model.path.name


def merge_window(options: argparse.Namespace, span: tuple[int, int] | None) -> None:
    """What the flags ask for: a merge, an explanation, a plot."""
    torch.set_num_threads(1)  # ours share the work
    if options.out is not None:
        refuse_existing(Path(options.out))
    members = chosen(find_members(options.members, options.allow_pickle), options.last, span)
    check_alike([member.model for member in members])
    starts, end = [member.start for member in members], members[-1].end
    shares = token_shares(starts, end).tolist()
    c = weights(options.curve, shares, options.quadrature).tolist()
    maps = Maps()
    if options.explain:
        explain(members, maps, newest_curvature(Path(options.members[0])))
    if options.plot is not None:
        from distmerge.windows.plot import plot

        plot(c, shares, Path(options.plot), options.curve)
    if options.out is not None:
        write(Path(options.out), members, c, shares, maps, options)
        print(f"{options.out}: {len(members)} merged by {options.curve}, N_eff {effective_count(c):.1f}")


def find_members(references: list[str], allow_pickle: bool) -> list[Member]:
    """The blocks of a run directory, or the models named.

    Raises:
        UserError: where there are fewer than two.
    """
    first = Path(references[0])
    if len(references) == 1 and ((first / "window").is_dir() or (first / "config.toml").exists()):
        members = blocks_of(first / "window")
    else:
        members = [member_of(reference, position, allow_pickle) for position, reference in enumerate(references)]
        if len({member.step is None for member in members}) > 1 or len({member.end is None for member in members}) > 1:
            raise UserError("all members must be blocks, or all end in their step, or none: their positions are no one scale")
    if len(members) < 2:
        raise UserError(f"a window needs at least two members, got {len(members)} from {' '.join(references)}")
    return members


def blocks_of(root: Path) -> list[Member]:
    """The newest constant-rate stretch of a run, without tainted blocks."""
    records = [legible(path) for path in published_blocks(root)]
    identity = read_identity(root.parent)
    for record in records:
        if problem := stranger(root / record.name, identity, BLOCK_RECORD):
            raise UserError(f"{root / record.name}: {problem}; move the block away to go on without it")
    usable = mergeable(records)
    return [member_of(str(root / block.name), 0, False) for block in usable]


def member_of(reference: str, position: int, allow_pickle: bool) -> Member:
    """A block knows its tokens; another model's step is the number at the end of its name, else its place in the list."""
    path = Path(reference)
    if is_foreign(path):
        reference = str(as_safetensors(path, allow_pickle))
    model = open_model(reference)
    if (path / BLOCK_RECORD).exists():
        block = legible(path)
        if block.tainted:
            raise UserError(f"{path} is tainted: a spike touched it, or its course was given up for one; leave it out")
        if block.kind == "mean":
            return Member(model, block.last_step, block.first_token, block.last_token)
        return Member(model, block.last_step, block.last_token, None)
    number = re.search(r"(\d+)$", newest_tag(path) or path.name)
    step = int(number.group(1)) if number else None
    return Member(model, step, float(position if step is None else step), None)


def chosen(members: list[Member], last: int | None, span: tuple[int, int] | None) -> list[Member]:
    if span is not None:
        if any(member.step is None for member in members):
            raise UserError("--steps needs members with a step: blocks, or names that end in one")
        members = [member for member in members if span[0] <= (member.step or 0) <= span[1]]
    if last is not None and last > len(members):
        raise UserError(f"--last must be <= {len(members)}, the members that there are to merge, got {last}")
    members = members[-last:] if last is not None else members
    if len(members) < 2:
        raise UserError(f"a window needs at least two members, --last and --steps leave {len(members)}")
    return members


def check_alike(models: list[Model]) -> None:
    """All of one architecture and vocabulary: the same names and shapes."""
    first = models[0]
    for model in models[1:]:
        for name in first.tensors.keys() | model.tensors.keys():
            if name not in first.tensors or name not in model.tensors:
                holder, other = (first, model) if name in first.tensors else (model, first)
                raise UserError(f"{other.reference} has no tensor {name}, which {holder.reference} has: not one architecture")
            ours, theirs = first.tensors[name].shape, model.tensors[name].shape
            if ours != theirs:
                raise UserError(f"{name} is {list(ours)} in {first.reference} and {list(theirs)} in {model.reference}")


def write(
    out: Path, members: list[Member], c: list[float], shares: list[float], maps: Maps, options: argparse.Namespace
) -> None:
    """Merge and publish."""
    jobs = [job_of(name, members, c, maps, options.dtype) for name in members[0].model.tensors]
    table = implied_curve(np.array(c), shares)
    record = {
        "tool": "distmerge",
        "verb": "window",
        "curve": options.curve,
        "quadrature": options.quadrature,
        "weights": {member.model.reference: weight for member, weight in zip(members, c, strict=True)},
        "positions": {member.model.reference: member.start for member in members},
        "implied_schedule": list(zip(table.x.tolist(), table.d.tolist(), strict=True)),
        "effective_count": effective_count(c),
    }
    newest = members[-1].model
    dtype = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(options.dtype)

    def close(report: Report) -> dict[str, bytes]:
        small = newest.carried(("generation_config.json", *TOKENIZER_FILES))
        if newest.config:
            small["config.json"] = as_json(newest.config | ({"dtype": dtype} if dtype else {}))
        return small | {RECORD: as_json(record | {"inputs": report.inputs, "outputs": report.outputs})}

    settings = Settings(options.threads or len(os.sched_getaffinity(0)), options.chunk)
    recorded = recorded_files(member.model for member in members)
    with Stream(jobs, settings) as stream, closing(Digests(settings.threads, recorded)) as digests:
        write_model(stream, out, identity(record, members, options.dtype), SHARD_BYTES, close, digests)


def job_of(name: str, members: list[Member], c: list[float], maps: Maps, dtype: str | None) -> Job:
    """A parameter is averaged; a tensor of no numbers that can be is a buffer, which has a policy or is refused."""
    entries = [member.model.tensors[name] for member in members]
    sources = tuple(OnDisk(entry, maps) for entry in entries)
    kinds = {entry.dtype for entry in entries}
    if kinds <= set(FLOATS):
        out = dtype or (kinds.pop() if len(kinds) == 1 else "F32")
        return Job(name, entries[0].shape, out, WeightedMean(c, normalize=False), sources)
    if len(kinds) > 1:
        raise UserError(f"{name} is {' and '.join(sorted(kinds))} in different members")
    policy = POLICIES.get(name.rpartition(".")[2])
    if policy == "last":
        return Job(name, entries[-1].shape, entries[-1].dtype, Scaled(None, torch.float32), sources[-1:])
    if policy == "equal":
        return Job(name, entries[0].shape, entries[0].dtype, Same(), sources)
    raise UserError(f"buffer {name} ({entries[0].dtype}) has no merge policy, and is no floating-point parameter")


def explain(members: list[Member], maps: Maps, curvature: Curvature | None) -> None:
    """Print the gate's advice, by plain distances and, where a checkpoint of the run has one, by the curvature."""
    starts, end, names = [member.start for member in members], members[-1].end, [member.name for member in members]
    print(advice.explain(advice.advise(gram(members, maps), starts, end), names))
    floats = {name for name, entry in members[0].model.tensors.items() if entry.dtype in FLOATS}
    if curvature is not None and curvature.mean > 0 and floats <= curvature.diagonal.keys():
        print(f"the same, distances weighed by the curvature (Adam's second moments in {curvature.source}):")
        print(advice.explain(advice.advise(gram(members, maps, curvature), starts, end), names))


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


def identity(record: dict[str, Any], members: list[Member], dtype: str | None) -> str:
    """All that the output depends on; an interrupted merge of the same is resumed."""
    files = [file for member in members for file in member.model.files]
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps([record, dtype, stats], sort_keys=True).encode()).hexdigest()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
