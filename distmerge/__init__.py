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
    from distmerge.errors import UserError
    from distmerge.flat import FlatParameters, flatten
    from distmerge.workers.diloco import DiLoCo, MergeReport

__all__ = ["DiLoCo", "FlatParameters", "MergeReport", "UserError", "flatten"]

ROOMS = {
    "DiLoCo": "distmerge.workers.diloco",
    "MergeReport": "distmerge.workers.diloco",
    "FlatParameters": "distmerge.flat",
    "flatten": "distmerge.flat",
    "UserError": "distmerge.errors",
}


def __getattr__(name: str) -> Any:
    if name not in ROOMS:
        raise AttributeError(f"module 'distmerge' has no attribute {name!r}")
    return getattr(importlib.import_module(ROOMS[name]), name)
