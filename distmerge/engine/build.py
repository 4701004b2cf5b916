"""Builds the engine that the configuration names. FSDP and DeepSpeed are imported only when they are used."""

from __future__ import annotations

from torch import nn

from distmerge.config.train import TrainConfig
from distmerge.engine.engine import Engine
from distmerge.engine.torch import TorchEngine
from distmerge.mesh import Mesh


def build_engine(model: nn.Module, config: TrainConfig, mesh: Mesh) -> Engine:
    """The engine of ``config.engine.kind``, with ``model`` laid out over the worker's ranks. All ranks call it together."""
    match config.engine.kind:
        case "torch":
            return TorchEngine(model, config, mesh)
        case "fsdp":
            from distmerge.engine.fsdp import FSDPEngine

            return FSDPEngine(model, config, mesh)
        case "deepspeed":
            from distmerge.engine.deepspeed import ZeroEngine

            return ZeroEngine(model, config, mesh)
