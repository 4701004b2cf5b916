"""Tiny engines in real ranks: what the matrix of engines and mergers trains, and what it looks at afterwards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import distmerge as dm
from distmerge.config import toml
from distmerge.config import train as sections
from distmerge.config.train import TrainConfig
from distmerge.engine.build import build_engine
from distmerge.engine.engine import Engine
from distmerge.launch.ranks import Place
from distmerge.mesh import Mesh
from distmerge.theta.flat import fingerprint

ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": "torch"},
    "fsdp": {"kind": "fsdp"},
    "zero 0": {"kind": "deepspeed", "config": {"zero_optimization": {"stage": 0}}},
    "zero 1": {"kind": "deepspeed", "config": {"zero_optimization": {"stage": 1}}},
    "zero 2": {"kind": "deepspeed", "config": {"zero_optimization": {"stage": 2}}},
    "zero 3": {"kind": "deepspeed", "config": {"zero_optimization": {"stage": 3}}},
}

MERGERS: dict[str, dict[str, Any]] = {
    "diloco": {"kind": "diloco", "every": 3, "outer_momentum": 0.5},
    "sparta": {"kind": "sparta", "every": 1, "fraction": 0.2},
    "streaming int8": {"kind": "streaming-diloco", "every": 4, "fragments": 2, "overlap": 1, "wire": "int8"},
    "sharded outer": {"kind": "diloco", "every": 3, "outer_sharded": True},
}

VOCABULARY = 48


def settings(engine: dict[str, Any], merger: str = "diloco", data: dict[str, Any] | None = None, **train: Any) -> TrainConfig:
    return toml.validate(
        {
            "run_dir": "unused",
            "mesh": {"workers": 2, "device": "cpu", "timeout_seconds": 600},
            "model": {"config": {"model_type": "llama"}},
            "merge": [MERGERS[merger]],
            "engine": engine,
            "data": data or {},
            "train": {"batch_size": 2, "gradient_accumulation": 2} | train,
        }
    )


def tiny_model() -> Any:
    """Odd sizes, so that no parameter divides evenly; tied embeddings."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", hidden_size=18, intermediate_size=23, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=3, vocab_size=VOCABULARY, tie_word_embeddings=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def batch(mesh: Mesh, step: int) -> Tensor:
    """``[2, 2, 12]`` tokens: each worker's own sequences, dealt to its ranks; a pattern that can be learned."""
    rows = torch.randint(0, 8, (mesh.world, 2, 2, 1), generator=torch.Generator().manual_seed(step))
    return (rows[mesh.rank] + torch.arange(12)) % 8


def uneven_batch(rank: int, step: int) -> Tensor:
    """``[2, 2, 12]`` tokens, of which other numbers count in each micro step and on each rank."""
    rows = torch.randint(0, VOCABULARY, (2, 2, 12), generator=torch.Generator().manual_seed(10 * step + rank))
    rows[0, :, : 2 + 2 * rank] = ~rows[0, :, : 2 + 2 * rank]
    rows[1, 0] = ~rows[1, 0]
    return rows


@contextlib.contextmanager
def opened(config: TrainConfig, mesh: Mesh) -> Iterator[Engine]:
    engine = build_engine(tiny_model(), config, mesh)
    try:
        yield engine
    finally:
        engine.close()


def build_merger(config: TrainConfig, engine: Engine, mesh: Mesh) -> Any:
    from distmerge.workers.build import build_mergers

    return build_mergers(config, engine.parameters, mesh)[0]


@torch.no_grad()
def look(engine: Engine) -> tuple[float, int]:
    """The loss of one fixed batch as this rank computes it, and the bits of this rank's part of theta."""
    tokens = torch.arange(24).view(2, 12) % 8
    engine.model.eval()
    loss = engine.model(input_ids=tokens, labels=tokens, use_cache=False).loss.item()
    engine.parameters.pull()
    return loss, int(fingerprint(engine.parameters.vector))


def whole(engine: Engine) -> dict[str, Tensor]:
    """The model in float32, as final/ would hold it; empty on ranks that do not write it."""
    state = engine.whole_state()
    if state is None and engine.replicated:
        state = engine.model.state_dict() if engine.model is engine.parameters.model else engine.parameters.model.state_dict()
    return {name: tensor.detach().clone() for name, tensor in (state or {}).items()}


def merge_and_look(mesh: Mesh, engine: dict[str, Any], merger: str, precision: str, steps: int = 6) -> dict[str, Any]:
    """Train, merge fully, and take a step of length zero, which brings every copy up to date with the masters."""
    config = settings(engine, merger, precision=precision)
    with opened(config, mesh) as made:
        joined = build_merger(config, made, mesh)
        losses = []
        for step in range(steps):
            losses.append(made.train_step(batch(mesh, step), 1e-2).loss.item())
            joined.step()
        joined.finish()
        merged = look(made)
        theta = whole(made)
        made.train_step(batch(mesh, steps), 0.0)
        stepped = look(made)
        later = [made.train_step(batch(mesh, steps + step), 1e-2).loss.item() for step in range(2)]
        return {
            "place": (mesh.worker, mesh.shard),
            "losses": losses + later,
            "merged": merged,
            "stepped": stepped,
            "theta": theta,
            "bytes": joined.bytes_sent,
            "rounds": joined.round + 2,
            "notes": made.notes,
        }


def train_plainly(mesh: Mesh, engine: dict[str, Any], steps: int = 20) -> dict[str, Any]:
    """20 steps in float32 with merges after 8 and 16."""
    config = settings(engine)
    with opened(config, mesh) as made:
        joined = dm.DiLoCo(made.parameters, every=8, outer_lr=0.7, outer_momentum=0.5, group=mesh.peers)
        results = []
        for step in range(steps):
            results.append(made.train_step(batch(mesh, step), 2e-3))
            joined.step()
        seen = [(result.loss.item(), result.grad_norm.item()) for result in results]
        return {"theta": whole(made), "seen": seen, "round": joined.round}


def first_step(mesh: Mesh, engine: dict[str, Any], uneven: bool) -> tuple[int, float, float, Tensor]:
    """The worker, the loss and the gradient's norm of a first step as this rank tells them, and the rank's own tokens."""
    tokens = uneven_batch(mesh.rank, 0) if uneven else batch(mesh, 0)
    with opened(settings(engine, data={"format": "completion"} if uneven else None), mesh) as made:
        result = made.train_step(tokens, 1e-3)
        return mesh.worker, result.loss.item(), result.grad_norm.item(), tokens


def many(cases: list[tuple[Callable[..., Any], tuple]]) -> list[Any]:
    """``function(mesh, *arguments)`` for several cases in the same groups, of two workers."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = Mesh(sections.MeshSettings(workers=2, device="cpu", timeout_seconds=600), Place(rank, world, rank, world), threads=1)
    with contextlib.closing(mesh):
        return [function(mesh, *arguments) for function, arguments in cases]
