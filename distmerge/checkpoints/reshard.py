"""Reads a checkpoint in another layout: other numbers of ranks per worker, or the fsdp engine in place of the torch engine.

Every file holds parts of flattened, named tensors. A rank collects the parts that it needs from the files that hold them, for
the parameters, the optimizer's moments and the mergers' vectors. (torch.distributed.checkpoint could reshard the first two, but
not a rank's share of the anchor, which is a flat vector; and its metadata is a pickle, which is never read here.) State that
depends on the layout itself cannot be carried over, and such a checkpoint is refused.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from distmerge.config.train import TrainConfig
from distmerge.engine.engine import Engine, Read
from distmerge.engine.stored import Pieces, parts_in
from distmerge.errors import UserError
from distmerge.mesh import Mesh
from distmerge.theta.flat import Part

PORTABLE = ("torch", "fsdp")
"""Engines whose checkpoints can be resharded, also from one to the other."""


class Target(Protocol):
    """What a checkpoint is loaded into."""

    config: TrainConfig
    mesh: Mesh
    engine: Engine


def layout(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """What a manifest records about the layout that wrote the checkpoint."""
    sequences = config.train.batch_size * config.train.gradient_accumulation * mesh.world
    return {"world": mesh.world, "workers": mesh.workers, "engine": config.engine.kind, "sequences": sequences}


def same(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether two layouts are equal. A key that an old manifest lacks counts as equal."""
    return all(old.get(key, new[key]) == new[key] for key in ("world", "workers", "engine"))


def check(path: Any, old: dict[str, Any], config: TrainConfig, mesh: Mesh) -> None:
    """Refuse a checkpoint that this run cannot resume from.

    Args:
        path: of the checkpoint, for the message.
        old: the layout in its manifest.

    Raises:
        UserError: saying what does not fit, and what would.
    """
    new = layout(config, mesh)
    old = {"engine": "torch"} | old
    if old["workers"] != new["workers"]:
        raise UserError(
            f"{path} was written by {old['world']} ranks in {old['workers']} workers, got {new['world']} ranks in "
            f"{new['workers']}; resume with the same number of workers, or take another --run-dir"
        )
    if old.get("sequences", new["sequences"]) != new["sequences"]:
        raise UserError(
            f"config.train.batch_size x gradient_accumulation x {new['world']} ranks must be {old['sequences']}, the sequences "
            f"of a step in {path}, got {new['sequences']}"
        )
    if same(old, new):
        return
    written = f"{path} was written by {old['world']} ranks of engine {old['engine']}, got {new['world']} of {new['engine']}"
    if not {old["engine"], new["engine"]} <= set(PORTABLE):
        raise UserError(f"{written}; DeepSpeed's state can only be read by the same engine on the same number of ranks so far")
    for reason in tied_to_layout(config):
        raise UserError(f"{written}, but {reason}; resume in the same layout")


def tied_to_layout(config: TrainConfig) -> list[str]:
    """Reasons why a run's state cannot be carried over to another layout; empty if it can."""
    reasons: list[str] = []
    if config.data.streaming:
        reasons.append("a stream's position belongs to a rank (data.streaming)")
    if config.window is not None:
        reasons.append("each rank keeps its own part of the blocks of a [window]")
    for index, entry in enumerate(config.merge):
        reasons += [f"merge[{index}]{reason}" for reason in entry.tied_to_layout()]
    return reasons


def load(target: Target, read: Read, old: dict[str, Any]) -> dict[str, Any]:
    """Load parameters and moments into the engine from a checkpoint in another layout.

    Args:
        read: reads one of the checkpoint's files, by name.
        old: the layout in its manifest.

    Returns:
        the rest of this rank's state. Its generators are None, since those of the old ranks do not apply.

    Raises:
        UserError: if a merge was in flight.
    """
    mesh, engine = target.mesh, target.engine
    shards = old["world"] // old["workers"]
    of_worker = f"{mesh.worker:05}"
    tags = [of_worker] if old["engine"] == "torch" else [f"{of_worker}-{shard:05}" for shard in range(shards)]
    files = [read(f"parameters-{tag}.safetensors") for tag in tags]
    load_parameters(engine, files)
    engine.load_optimizer_state(moments(engine, files, [read(f"optimizer-{tag}.pt") for tag in tags]))
    states = [read(f"rank-{mesh.worker * shards + shard:05}.pt") for shard in range(shards)]
    state = states[0]
    state["mergers"] = [
        merger_state(engine, [theirs["mergers"][index] for theirs in states], [theirs["parts"] for theirs in states])
        for index in range(len(state["mergers"]))
    ]
    state["generators"] = None
    return state


@torch.no_grad()
def load_parameters(engine: Engine, files: list[dict[str, Tensor]]) -> None:
    pieces = Pieces()
    for tensors in files:
        for name, first, values in parts_in(tensors):
            pieces.add(name, first, values)
    vector = engine.parameters.vector
    for part in engine.parameters.parts():
        vector[part.offset : part.offset + part.numel].copy_(pieces.take(part.name, part.first, part.numel))
    engine.parameters.push()
    for name, buffer in engine.parameters.model.named_buffers():
        buffer.copy_(files[0][f"buffer:{name}"])


def moments(engine: Engine, files: list[dict[str, Tensor]], states: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The states of the optimizers, with moments for this rank's shards (or whole parameters, if these are replicated).

    Args:
        files: the parameter files of the checkpoint, which say where in each parameter the file's part begins.
        states: for each file, the states of the optimizers over the same parts.
    """
    names = {id(p): name for name, p in engine.parameters.named_tensors()}
    held = {slot.name: slot for slot in engine.parameters.layout}  # slots cover whole parameters if those are replicated
    result: list[dict[str, Any]] = []
    for number, optimizer in enumerate(engine.optimizers):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Any]] = {}
        for index, counts in states[0][number]["state"].items():
            slot = held[names[id(parameters[index])]]
            own = engine.shard_of(parameters[index]).shape
            state[index] = {}
            for key, value in counts.items():
                if not isinstance(value, Tensor) or value.ndim == 0:
                    state[index][key] = value
                    continue
                pieces = Pieces()
                for tensors, theirs in zip(files, states, strict=True):
                    firsts = {name: first for name, first, _ in parts_in(tensors)}
                    if slot.name in firsts:
                        pieces.add(slot.name, firsts[slot.name], theirs[number]["state"][index][key].reshape(-1))
                state[index][key] = pieces.take(slot.name, slot.first, slot.numel).view(own)
        result.append({"state": state, "param_groups": states[0][number]["param_groups"]})
    return result


def merger_state(engine: Engine, states: list[dict[str, Any]], parts: list[list[tuple]]) -> dict[str, Any]:
    """A merger's state with its vectors in this rank's layout.

    Args:
        states: the merger's state on each rank that wrote the worker's checkpoint.
        parts: for each of these ranks, the fields of its parts of theta (:class:`distmerge.theta.flat.Part`).
    """
    state = dict(states[0])
    if state["flying"] is not None:
        raise UserError(
            "a merge was in flight at the newest checkpoint, and its messages fit only the old layout; resume in it"
        )
    if state["outer"] is None:
        return state
    vectors = {key: [theirs["outer"][key] for theirs in states] for key, value in state["outer"].items() if value is not None}
    return state | {"outer": state["outer"] | {key: laid_out(engine, theirs, parts) for key, theirs in vectors.items()}}


def laid_out(engine: Engine, vectors: list[Tensor], parts: list[list[tuple]]) -> Tensor:
    """A vector over theta in this rank's layout, put together from the vectors of the ranks that wrote the checkpoint."""
    pieces = Pieces()
    for vector, theirs in zip(vectors, parts, strict=True):
        for part in (Part(*fields) for fields in theirs):
            pieces.add(part.name, part.first, vector[part.offset : part.offset + part.numel])
    result = torch.empty_like(engine.parameters.vector)
    for part in engine.parameters.parts():
        result[part.offset : part.offset + part.numel] = pieces.take(part.name, part.first, part.numel)
    return result
