"""distmerge: merging as an event in training.

    import distmerge as dm
    merger = dm.DiLoCo(model, every=50)
    optimizer.step(); merger.step()
    merger.finish()

    dm.merge(method="ties", models=["a", "b"], base="base", density=0.5, out="merged")

Names are imported when they are first used, so importing the package does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distmerge.api import diagnose, merge, sweep, window
    from distmerge.config.presets import PRESETS
    from distmerge.engine.deepspeed import WorkerRanks
    from distmerge.engine.flatten import flatten
    from distmerge.errors import UserError
    from distmerge.merging.diagnosis import Diagnosis
    from distmerge.merging.options import DiagnoseOptions, MergeOptions, SweepOptions, TextOptions
    from distmerge.merging.results import MergeResult
    from distmerge.merging.sweep import SweepPoint, SweepResult
    from distmerge.rules.custom import rule
    from distmerge.rules.protocol import Block, Rule, Target
    from distmerge.theta.flat import FlatParameters
    from distmerge.windows.merge import WindowResult
    from distmerge.windows.options import WindowOptions
    from distmerge.workers.compose import compose
    from distmerge.workers.diloco import DiLoCo
    from distmerge.workers.divergence import MergeReport
    from distmerge.workers.merger import Merger
    from distmerge.workers.sparta import SPARTA

    __version__: str

__all__ = [
    "PRESETS", "SPARTA", "Block", "DiLoCo", "DiagnoseOptions", "Diagnosis", "FlatParameters", "MergeOptions",
    "MergeReport", "MergeResult", "Merger", "Rule", "SweepOptions", "SweepPoint", "SweepResult", "Target",
    "TextOptions", "UserError", "WindowOptions", "WindowResult", "WorkerRanks", "__version__", "compose", "diagnose",
    "flatten", "merge", "rule", "sweep", "window",
]  # fmt: skip

MODULE_OF = {
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
    "merge": "distmerge.api",
    "diagnose": "distmerge.api",
    "sweep": "distmerge.api",
    "window": "distmerge.api",
    "MergeOptions": "distmerge.merging.options",
    "DiagnoseOptions": "distmerge.merging.options",
    "SweepOptions": "distmerge.merging.options",
    "TextOptions": "distmerge.merging.options",
    "WindowOptions": "distmerge.windows.options",
    "MergeResult": "distmerge.merging.results",
    "Diagnosis": "distmerge.merging.diagnosis",
    "SweepPoint": "distmerge.merging.sweep",
    "SweepResult": "distmerge.merging.sweep",
    "WindowResult": "distmerge.windows.merge",
    "rule": "distmerge.rules.custom",
    "Rule": "distmerge.rules.protocol",
    "Target": "distmerge.rules.protocol",
    "Block": "distmerge.rules.protocol",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from distmerge.version import installed_version

        return installed_version()
    if name not in MODULE_OF:
        raise AttributeError(f"module 'distmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
