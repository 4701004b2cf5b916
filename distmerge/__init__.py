"""distmerge: training in which merging is an event.

    import distmerge as dm
    merger = dm.DiLoCo(model, every=50)
    optimizer.step(); merger.step()
    merger.finish()

Names are loaded when they are first used, so that importing the package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmerge.config.presets import PRESETS
    from distmerge.engine.deepspeed import WorkerRanks
    from distmerge.engine.flatten import flatten
    from distmerge.errors import UserError
    from distmerge.rules.custom import rule
    from distmerge.rules.protocol import Block, Rule, Target
    from distmerge.theta.flat import FlatParameters
    from distmerge.workers.compose import compose
    from distmerge.workers.diloco import DiLoCo
    from distmerge.workers.divergence import MergeReport
    from distmerge.workers.merger import Merger
    from distmerge.workers.sparta import SPARTA

__all__ = [
    "PRESETS", "SPARTA", "Block", "DiLoCo", "FlatParameters", "MergeReport", "Merger", "Rule", "Target", "UserError",
    "WorkerRanks", "compose", "flatten", "rule",
]  # fmt: skip

ROOMS = {
    "DiLoCo": "distmerge.workers.diloco",
    "SPARTA": "distmerge.workers.sparta",
    "compose": "distmerge.workers.compose",
    "WorkerRanks": "distmerge.engine.deepspeed",
    "PRESETS": "distmerge.config.presets",
    "MergeReport": "distmerge.workers.divergence",
    "Merger": "distmerge.workers.merger",
    "FlatParameters": "distmerge.theta.flat",
    "flatten": "distmerge.engine.flatten",
    "UserError": "distmerge.errors",
    "rule": "distmerge.rules.custom",
    "Rule": "distmerge.rules.protocol",
    "Target": "distmerge.rules.protocol",
    "Block": "distmerge.rules.protocol",
}


def __getattr__(name: str) -> Any:
    if name not in ROOMS:
        raise AttributeError(f"module 'distmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(ROOMS[name]), name)
