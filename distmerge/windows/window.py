"""The window: blocks of steps at a constant learning rate, each stored as one checkpoint, to be merged in place of a decay.

A block of kind "mean" is the running mean of theta over its steps (https://arxiv.org/abs/2405.18392): it takes the storage of
one snapshot but averages over the noise of the whole block. Means over workers and over time commute, so that several workers
need only one reduction per block. If a merger keeps an anchor, a block is instead the mean of the anchors after each merge in
it, which all workers have. A block never spans a change of the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from distmerge.checkpoints.store import step_of
from distmerge.config import train as config
from distmerge.errors import UserError
from distmerge.files.directories import clear_leftovers, guarded, remove
from distmerge.finite import nonfinite
from distmerge.mesh import Mesh
from distmerge.rules.mean import add_weighted
from distmerge.rundir.identity import Identity
from distmerge.theta.flat import FlatParameters
from distmerge.windows.blocks import (
    TENSORS,
    Block,
    block_weights,
    describe,
    mark_tainted,
    marks,
    merge_stored,
    mergeable,
    publish_block,
    published_blocks,
)
from distmerge.workers.group import WorkerGroup
from distmerge.workers.merger import Merger

Tell = Callable[[int, str, dict[str, Any]], None]
"""``tell(step, event, facts)`` writes a line of events.jsonl, on the rank that writes them."""


class Window:
    """Follows a run step by step, and publishes its blocks.

    Args:
        root: the directory in which blocks are published.
        flat: theta, this worker's parameters.
        mergers: if one of them keeps an anchor, blocks average that and not theta.
        tokens_per_step: the sum over all workers.
        identity: the run's identity, on the rank that writes its blocks.

    Raises:
        UserError: if a block is shorter than the merge interval of the merger that keeps an anchor.
    """

    def __init__(
        self,
        section: config.WindowSettings,
        root: Path,
        flat: FlatParameters,
        mergers: Sequence[Merger],
        mesh: Mesh,
        tokens_per_step: int,
        tokenizer: PreTrainedTokenizerBase,
        tell: Tell,
        identity: Identity | None = None,
    ):
        self.section, self.root, self.flat, self.mesh = section, root, flat, mesh
        self.tokens_per_step, self.tokenizer, self.tell, self.identity = tokens_per_step, tokenizer, tell, identity
        self.every = steps_per_block(section, tokens_per_step)
        self.anchored = next((merger for merger in mergers if merger.anchor is not None), None)
        if self.anchored is not None and self.every < self.anchored.every:
            raise UserError(
                f"config.window.every must be >= {self.anchored.every}, the merge interval of a merger that keeps an "
                f"anchor, got {self.every}: a block would hold no merge"
            )
        self.peers = WorkerGroup(mesh.peers)
        self.mean = torch.zeros_like(flat.vector, device="cpu" if section.offload else None)
        self.losses = torch.zeros(2, dtype=torch.float64, device=flat.vector.device)  # sum and number of the finite ones
        self.count = 0  # states of theta in the mean so far
        self.lr: float | None = None
        self.stretch = 0  # steps before the learning rate took its present value
        self.rounds = 0  # of the merger with the anchor, when it was last read
        self.tainted = False  # whether the block in progress will be dropped
        self.held: list[str] = []  # names of blocks that are marked as tainted until they are released
        self.blocks: list[Block] = []
        self.kept: list[Tensor] = []  # for store = "memory": the parameters of each block

    def open(self, step: int) -> None:
        """Delete what an interrupted job left, and blocks newer than ``step``, the checkpoint that the run resumed from.

        Older blocks that have since been removed, or can no longer be read, are forgotten. Taint marks on disk override those
        of the restored state."""
        if self.section.store == "memory":
            return
        with self.mesh.raise_on_all_ranks():
            if self.mesh.leads:
                guarded(self.root, lambda: clear_leftovers(self.root))
                for path in published_blocks(self.root):
                    if step_of(path) > step:
                        guarded(path, lambda path=path: remove(path))
        shared = [marks(self.root) if self.mesh.leads else {}]
        dist.broadcast_object_list(shared, 0)
        on_disk = shared[0]
        blocks = [block for block in self.blocks if block.name in on_disk]
        self.blocks = [replace(block, tainted=on_disk[block.name] or block.name in self.held) for block in blocks]

    @torch.no_grad()
    def observe(self, step: int, lr: float, loss: Tensor, suspicious: bool = False) -> Block | None:
        """Take in the state after inner step ``step``, counted from 1; the block that ended there, if it was published.

        A collective at the last step of a block.

        Args:
            suspicious: whether this worker's last steps may turn out to be part of a divergence. If this is so on any worker at
                the end of a block, the block is published as tainted, until :meth:`release`.
        """
        if lr != self.lr:
            self.lr, self.stretch = lr, step - 1
            self._begin()
        if (step - 1) // self.every * self.every < self.stretch:
            return None  # the block began at another learning rate: steps 24 to 30 if every = 10 and stretch = 23
        self.losses += torch.stack([loss.nan_to_num(0.0, 0.0, 0.0), loss.isfinite()])
        if self._due(step):
            self.flat.pull()
            theta = self.flat.vector if self.anchored is None else self.anchored.anchor
            assert theta is not None, "a merger that has an anchor keeps it"
            self._take(theta)
        return self._end(step, suspicious) if step % self.every == 0 else None

    def taint(self) -> None:
        """Mark the block in progress: it took in values that must not be kept, so it will be dropped at its end."""
        self.tainted = True

    def taint_published(self, since: int, held_only: bool = False) -> list[str]:
        """Mark the published blocks that a spike touched from step ``since`` on as tainted for good; their names. A collective.

        Args:
            held_only: only mark blocks that are held back.

        Raises:
            UserError: if a mark cannot be written.
        """
        touched = [block.name for block in self.blocks if block.last_step >= since]
        held = [name for name in touched if name in self.held]
        marked = [block.name for block in self.blocks if block.name in touched and not block.tainted and not held_only]
        self.held = [name for name in self.held if name not in held]  # they are no longer to be released
        self._mark(marked, tainted=True)
        return [name for name in touched if name in held or name in marked]

    def release(self) -> list[str]:
        """Remove the marks of blocks that were held back; their names. A collective."""
        names, self.held = [block.name for block in self.blocks if block.name in self.held], []
        self._mark(names, tainted=False)
        return names

    def _mark(self, names: list[str], tainted: bool) -> None:
        if not names:
            return
        self.blocks = [replace(block, tainted=tainted) if block.name in names else block for block in self.blocks]
        with self.mesh.raise_on_all_ranks():
            for name in names if self.mesh.leads and self.section.store == "disk" else []:
                guarded(self.root / name, lambda name=name: mark_tainted(self.root / name, tainted))

    def _due(self, step: int) -> bool:
        """Whether this step's state counts: after a merge with an anchor, else every ``stride`` steps or at the snapshot."""
        if self.anchored is not None:
            merged, self.rounds = self.anchored.round != self.rounds, self.anchored.round
            return merged
        return step % (self.every if self.section.kind == "snapshot" else self.section.stride) == 0

    def _take(self, theta: Tensor) -> None:
        """Update the running mean: mean += (theta - mean) / count."""
        self.count += 1
        first = self.count == 1 or self.section.kind == "snapshot"
        self.mean.copy_(theta) if first else self.mean.lerp_(theta.to(self.mean.device), 1 / self.count)

    def _begin(self) -> None:
        self.count, self.tainted = 0, False
        self.losses.zero_()

    def _end(self, step: int, suspicious: bool) -> Block | None:
        """Reduce the block over the workers, publish it, and begin the next one."""
        unhealthy = nonfinite(self.mean).bool() | self.tainted
        sums = torch.cat([self.losses, torch.stack([unhealthy.to(self.losses), self.losses.new_tensor(float(suspicious))])])
        dist.all_reduce(sums)
        total, count, tainted, held = sums.tolist()
        block = Block(
            first_step=step - self.every + 1,
            last_step=step,
            first_token=(step - self.every) * self.tokens_per_step,
            last_token=step * self.tokens_per_step,
            lr=self.lr or 0.0,
            loss=total / max(count, 1),
            kind=self.section.kind,
            stretch=self.stretch,
            tainted=tainted > 0,
        )
        published = None
        if self.count and not block.tainted:
            if self.anchored is None and self.peers.size > 1:
                total = self.peers.total(self.mean.to(self.flat.vector.device))
                self.mean.copy_(total.div_(self.peers.size))
            published = self._publish(replace(block, tainted=held > 0))
        else:
            reason = "a spike touched it" if block.tainted else "no merge fell into it"
            self.tell(step, "block dropped", describe(block) | {"reason": reason})
        self._begin()
        return published

    def _publish(self, block: Block) -> Block | None:
        problem = None
        if self.section.store == "memory":
            self.kept.append(self.mean.to("cpu", copy=True))
        else:
            problem = self._write(block)
        if problem is not None:
            self.tell(block.last_step, "block dropped", describe(block) | {"reason": problem})
            return None
        self.blocks.append(block)
        if block.tainted:
            self.held.append(block.name)
        self.tell(block.last_step, "block held" if block.tainted else "block", describe(block))
        self._retain()
        return block

    def _write(self, block: Block) -> str | None:
        """Write a block to disk; on all ranks the problem, if it could not be written. Training continues without the block."""
        problem: str | None = None
        with self.flat.borrowed() as vector:
            vector.copy_(self.mean)
            self.flat.push()
            if self.mesh.leads:
                model: nn.Module = self.flat.model
                about = self.identity.manifest_entries() if self.identity else None
                try:
                    publish_block(self.root, block, model, self.tokenizer, self.section.dtype, about)
                except UserError as error:
                    problem = str(error)
        return self.mesh.first_problem(problem)

    def _retain(self) -> None:
        """Delete all but the configured number of newest blocks."""
        keep = self.section.blocks
        if not keep or len(self.blocks) <= keep:
            return
        doomed, self.blocks, self.kept = self.blocks[:-keep], self.blocks[-keep:], self.kept[-keep:]
        if self.section.store == "disk" and self.mesh.leads:
            for block in doomed:
                if (path := self.root / block.name).is_dir():
                    guarded(path, lambda path=path: remove(path))

    def mergeable(self, last: int | None = None) -> list[Block]:
        """The newest ``last`` blocks that may be merged, see :func:`distmerge.windows.blocks.mergeable`."""
        return mergeable(self.blocks, last)

    @torch.no_grad()
    def merge_into(self, flat: FlatParameters, curve: str, blocks: list[Block]) -> None:
        """Replace theta by the merge of ``blocks``, accumulated in float32. The caller must have borrowed ``flat``."""
        c = block_weights(curve, blocks)
        if self.section.store == "memory":
            flat.vector.zero_()
            for block, weight in zip(blocks, c, strict=True):
                add_weighted(flat.vector, self.kept[self.blocks.index(block)], weight)
        else:
            merge_stored([(self.root / block.name, TENSORS) for block in blocks], c, dict(flat.named_views()))
        flat.push()

    def state_dict(self) -> dict[str, Any]:
        return {
            "mean": self.mean,
            "losses": self.losses,
            "kept": self.kept,
            "blocks": [vars(block) for block in self.blocks],
            **{name: getattr(self, name) for name in ("count", "lr", "stretch", "rounds", "tainted", "held")},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean.copy_(state["mean"])
        self.losses.copy_(state["losses"])
        self.kept = list(state["kept"])
        self.blocks = [Block(**block) for block in state["blocks"]]
        self.held = list(state["held"])
        for name in ("count", "lr", "stretch", "rounds", "tainted"):
            setattr(self, name, state[name])


def steps_per_block(section: config.WindowSettings, tokens_per_step: int) -> int:
    """The length of a block in steps. If it is configured in tokens, it is rounded to whole steps."""
    if section.every is not None:
        return section.every
    assert section.every_tokens is not None
    return max(1, round(section.every_tokens / tokens_per_step))
