"""Blocks on disk: model directories that any tool can load, each with a record of its place in the run."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distmerge.errors import UserError
from distmerge.files.atomic import write_atomically
from distmerge.files.directories import publish_directory, published_directories, verify
from distmerge.files.manifest import as_json, read_manifest, sealed
from distmerge.model import save_model
from distmerge.rules.mean import add_weighted
from distmerge.windows.curves import token_shares, weights

RECORD = "block.json"
TENSORS = "*.safetensors"
"""The files of a block's parameters."""


@dataclass(frozen=True)
class Block:
    """Consecutive steps of a run at one learning rate, summarized by one set of parameters.

    Attributes:
        first_step, last_step: its first and its last inner step, counted from 1.
        first_token, last_token: tokens that all workers had seen before the block, and at its end.
        lr: the learning rate of all its steps.
        loss: the mean training loss in it, over all workers.
        kind: "mean" of the parameters over the block, or "snapshot" at its end.
        stretch: the number of steps before the learning rate took its value. It identifies the constant-rate phase; blocks of
            different phases are not merged with each other.
        tainted: whether a spike touched the block or may have, or a roll-back discarded it. Merges leave it out.
    """

    first_step: int
    last_step: int
    first_token: int
    last_token: int
    lr: float
    loss: float
    kind: str
    stretch: int
    tainted: bool = False

    @property
    def name(self) -> str:
        return f"block-{self.last_step:08}"


def publish_block(
    root: Path,
    block: Block,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dtype: str,
    about: dict[str, Any] | None = None,
) -> Path:
    """Publish the model's present parameters as an HF directory with the block's record.

    Args:
        root: the directory of all blocks.
        dtype: of the parameters in the files.
        about: what the record says about the run.

    Returns:
        the block's directory.

    Raises:
        UserError: if the disk is full or not writable. Nothing that was published before is harmed.
    """
    published = root / block.name
    publish_directory(
        published, record_of(block) | (about or {}), lambda directory: save_model(model, tokenizer, directory, dtype), RECORD
    )
    return published


def record_of(block: Block) -> dict[str, Any]:
    """What a block's record says besides its files."""
    return {"step": block.last_step} | asdict(block)


def read_block(path: Path) -> Block:
    """A block's record.

    Raises:
        OSError, ValueError, KeyError, TypeError: if it is missing or damaged.
    """
    record = read_manifest(path, RECORD)
    return Block(**{key: record[key] for key in Block.__dataclass_fields__})


def load_block(path: Path) -> Block:
    """A block's record, for verbs that cannot do without it.

    Raises:
        UserError: if it is missing or damaged.
    """
    try:
        return read_block(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / RECORD} cannot be read ({error}); move the block away to go on without it") from None


def verify_block(path: Path, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with a published block, or None. XXH128 is checked, since it is hashed as fast as memory is read.

    Args:
        part, parts: check only every ``parts``-th file from file ``part`` on, to share the work among ranks.
    """
    return verify(path, part, parts, RECORD, "xxh128")


def mark_tainted(path: Path, tainted: bool = True) -> None:
    """Write to a published block's record whether it is tainted. Nothing else about a published block ever changes.

    A damaged block is left as it is, since no merge takes it anyway.
    """
    if verify(path, name=RECORD) is None:
        record = read_manifest(path, RECORD) | {"tainted": tainted}
        write_atomically(path / RECORD, as_json(sealed(record)))


def marks(root: Path) -> dict[str, bool]:
    """Whether each published block is tainted, by its name. Blocks whose records cannot be read are left out."""
    found: dict[str, bool] = {}
    for path in published_blocks(root):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            found[path.name] = read_block(path).tainted
    return found


def published_blocks(root: Path) -> list[Path]:
    """The directories of published blocks, oldest first."""
    return published_directories(root, "block")


def mergeable(blocks: list[Block], last: int | None = None) -> list[Block]:
    """The newest ``last`` blocks that may be merged, oldest first.

    These are untainted, have a finite loss and belong to the same constant-rate phase as the newest block.

    Args:
        blocks: oldest first.
        last: how many at most; None or 0 for all.
    """
    if not blocks:
        return []
    same_rate = [block for block in blocks if block.stretch == blocks[-1].stretch and block.lr == blocks[-1].lr]
    clean = [block for block in same_rate if not block.tainted and math.isfinite(block.loss)]
    return clean[-last:] if last else clean


def stable_blocks(root: Path, count: int, up_to: int) -> list[str]:
    """Names of the newest ``count`` blocks that verify, can be merged together and end by step ``up_to``; newest first."""
    good: list[Block] = []
    for path in reversed(published_blocks(root)):
        if len(good) == count:
            break
        if int(path.name.rpartition("-")[2]) <= up_to and verify(path, name=RECORD) is None:
            block = read_block(path)
            good += [block] if block in mergeable([block, *good[:1]]) else []
    return [block.name for block in good]


def block_weights(curve: str, blocks: list[Block]) -> list[float]:
    """Merge weights of a run's blocks, oldest first.

    Blocks of kind "mean" tile the window, so a block's position is its start. A snapshot's position is the end of its block.
    """
    if blocks[-1].kind == "mean":
        shares = token_shares([block.first_token for block in blocks], blocks[-1].last_token)
    else:
        shares = token_shares([block.last_token for block in blocks])
    return weights(curve, shares.tolist()).tolist()


def merge_stored(members: Iterable[tuple[Path, str]], weights: Iterable[float], into: dict[str, Tensor]) -> None:
    """Write ``sum_m w_m theta_m`` of stored models into the tensors of ``into``, by name, in their dtype.

    Args:
        members: each model's directory, and the pattern of its files' names. Tensors that ``into`` does not name are left out.
    """
    for total in into.values():
        total.zero_()
    for (path, pattern), weight in zip(members, weights, strict=True):
        files = sorted(path.glob(pattern))
        assert files, f"{path} has no {pattern}"
        for file in files:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    if name in into:
                        add_weighted(into[name], tensors.get_tensor(name), weight)


def describe(block: Block) -> dict[str, Any]:
    """What an event says about a block."""
    return {"block": block.name, "loss": block.loss, "lr": block.lr, "tokens": block.last_token}
