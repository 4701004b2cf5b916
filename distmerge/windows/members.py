"""The members of a window: the blocks of a run, or other checkpoints of one model, with their positions in training."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from distmerge.errors import UserError
from distmerge.files.convert import as_safetensors, is_foreign, newest_tag
from distmerge.files.header import FLOATS, Stored
from distmerge.files.models import Model, open_model
from distmerge.files.sources import Maps, OnDisk
from distmerge.files.stream import Job
from distmerge.rules.passthrough import Same, Scaled
from distmerge.rundir.identity import identity_problem, read_identity
from distmerge.theta.buffers import POLICIES
from distmerge.windows.blocks import RECORD, load_block, mergeable, published_blocks


class Member(NamedTuple):
    """A checkpoint of the window.

    Attributes:
        model: its files.
        step: the last step that it was trained; None if unknown.
        start: its position: tokens before it if it is a block, else its step or its place in the list.
        end: tokens at the end of a block of kind "mean"; None for any other member.
    """

    model: Model
    step: int | None
    start: float
    end: float | None

    @property
    def name(self) -> str:
        return self.model.path.name


def find_members(references: list[str], allow_pickle: bool) -> list[Member]:
    """The blocks of a run, if its directory is the only reference; else the models that are named.

    Raises:
        UserError: if there are fewer than two, or their positions are not comparable.
    """
    first = Path(references[0])
    if len(references) == 1 and ((first / "window").is_dir() or (first / "config.toml").exists()):
        members = blocks_of(first / "window")
    else:
        members = [member_of(reference, position, allow_pickle) for position, reference in enumerate(references)]
        if len({member.step is None for member in members}) > 1 or len({member.end is None for member in members}) > 1:
            raise UserError(
                "the members must all be blocks, or all have names that end in their step, or neither: positions of different "
                "kinds cannot be compared"
            )
    if len(members) < 2:
        raise UserError(f"a window needs at least two members, got {len(members)} from {' '.join(references)}")
    return members


def blocks_of(root: Path) -> list[Member]:
    """The untainted blocks of a run's newest constant-rate phase, oldest first."""
    records = [load_block(path) for path in published_blocks(root)]
    identity = read_identity(root.parent)
    for record in records:
        if problem := identity_problem(root / record.name, identity, RECORD):
            raise UserError(f"{root / record.name}: {problem}; move the block away to go on without it")
    usable = mergeable(records)
    return [member_of(str(root / block.name), 0, False) for block in usable]


def member_of(reference: str, position: int, allow_pickle: bool) -> Member:
    """A block or another model as a member.

    A block's record gives its position. The position of any other model is the step at the end of its name, if there is one,
    else its place in the list.

    Args:
        position: its place in the list of members, from 0.
    """
    path = Path(reference)
    if is_foreign(path):
        reference = str(as_safetensors(path, allow_pickle))
    model = open_model(reference)
    if (path / RECORD).exists():
        block = load_block(path)
        if block.tainted:
            raise UserError(f"{path} is tainted: a spike touched it, or a roll-back discarded it; leave it out")
        if block.kind == "mean":
            return Member(model, block.last_step, block.first_token, block.last_token)
        return Member(model, block.last_step, block.last_token, None)
    number = re.search(r"(\d+)$", newest_tag(path) or path.name)
    step = int(number.group(1)) if number else None
    return Member(model, step, float(position if step is None else step), None)


def chosen(members: list[Member], last: int | None, span: tuple[int, int] | None) -> list[Member]:
    """The members that --steps (``span``) and --last leave.

    Raises:
        UserError: if fewer than two are left, or the members lack what the flags need.
    """
    if span is not None:
        if any(member.step is None for member in members):
            raise UserError("--steps needs members with a step: blocks, or names that end in one")
        members = [member for member in members if span[0] <= (member.step or 0) <= span[1]]
    if last is not None and last > len(members):
        raise UserError(f"--last must be <= {len(members)}, the number of members to choose from, got {last}")
    members = members[-last:] if last is not None else members
    if len(members) < 2:
        raise UserError(f"a window needs at least two members, --last and --steps leave {len(members)}")
    return members


def check_alike(models: list[Model]) -> None:
    """Refuse models unless all have tensors of the same names and shapes, as models of one architecture and vocabulary have."""
    first = models[0]
    for model in models[1:]:
        for name in first.tensors.keys() | model.tensors.keys():
            if name not in first.tensors or name not in model.tensors:
                holder, other = (first, model) if name in first.tensors else (model, first)
                raise UserError(
                    f"{other.reference} has no tensor {name}, which {holder.reference} has: models must share an architecture"
                )
            ours, theirs = first.tensors[name].shape, model.tensors[name].shape
            if ours != theirs:
                raise UserError(f"{name} is {list(ours)} in {first.reference} and {list(theirs)} in {model.reference}")


def is_parameter(entries: Sequence[Stored]) -> bool:
    """Whether a tensor is floating point in all members, so that it can be merged."""
    return {entry.dtype for entry in entries} <= set(FLOATS)


def dtype_of(entries: Sequence[Stored], asked: str | None) -> str:
    """The output's dtype of a parameter: the one asked for, else the members' own, or float32 if these differ."""
    kinds = {entry.dtype for entry in entries}
    return asked or (kinds.pop() if len(kinds) == 1 else "F32")


def merged_buffer(name: str, entries: Sequence[Stored], maps: Maps) -> Job:
    """The job of a tensor that is not a parameter but a buffer.

    Raises:
        UserError: if there is no policy for the buffer, or its dtype differs between members.
    """
    kinds = {entry.dtype for entry in entries}
    if len(kinds) > 1:
        raise UserError(f"{name} is {' and '.join(sorted(kinds))} in different members")
    policy = POLICIES.get(name.rpartition(".")[2])
    sources = tuple(OnDisk(entry, maps) for entry in entries)
    if policy == "last":
        return Job(name, entries[-1].shape, entries[-1].dtype, Scaled(None, torch.float32), sources[-1:])
    if policy == "equal":
        return Job(name, entries[0].shape, entries[0].dtype, Same(), sources)
    raise UserError(f"buffer {name} ({entries[0].dtype}) has no merge policy and is not a floating-point parameter")
