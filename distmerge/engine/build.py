"""The engine that the configuration names; what one alone needs is imported for it alone."""

from __future__ import annotations

from torch import nn

from distmerge.config.train import TrainConfig
from distmerge.engine.engine import Engine
from distmerge.engine.torch import TorchEngine
from distmerge.mesh import Mesh


def build_engine(model: nn.Module, config: TrainConfig, mesh: Mesh) -> Engine:
    """Lay ``model`` out over the worker's ranks; a collective of them."""
    match config.engine.kind:
        case "torch":
            return TorchEngine(model, config, mesh)
        case "fsdp":
            from distmerge.engine.fsdp import FSDPEngine

            return FSDPEngine(model, config, mesh)
        case "deepspeed":
            from distmerge.engine.deepspeed import ZeroEngine

            return ZeroEngine(model, config, mesh)
