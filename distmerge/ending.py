"""The end of a run: what came out is judged, published under a name that says what it is, and told."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmerge.checkpoints.durable import guarded, publish_directory
from distmerge.engine.soundness import sickness
from distmerge.files.durable import delete, write_atomically
from distmerge.flat import FlatParameters
from distmerge.mesh import Mesh
from distmerge.metrics import table
from distmerge.rundir import RunDirectory

NOISE = 0.01
"""A run that has learned nothing ends a little above or below the loss that it began with, which is no divergence: a hundredth
of it, and of a nat at least."""


def divergence(flat: FlatParameters, mesh: Mesh, first_loss: float | None, loss: float) -> str | None:
    """Why the model is no result, in words, or None; a collective.

    Args:
        first_loss: the evaluation before the first step.
        loss: the evaluation of the model as it stands.
    """
    if (sick := sickness(flat, mesh)) is not None:
        return sick
    if not math.isfinite(loss):
        return "its evaluation loss is not finite"
    if first_loss is not None and loss > first_loss + NOISE * max(1.0, first_loss):
        return f"its evaluation loss is {loss:.3f}, above the {first_loss:.3f} that it began with"
    return None


def publish_end(directory: RunDirectory, about: dict[str, Any], summary: dict[str, Any], save: Callable[[Path], None]) -> None:
    """Publish the model, then the summary that speaks of it; then tell it.

    A model that is no result lies in ``final.diverged``, beside the ``final`` of an earlier end, if there is one.

    Args:
        about: what the model's manifest says of the run.
        summary: with a reason as ``diverged`` where the model is no result.
        save: fills a model directory.
    """
    diverged = summary.get("diverged")
    place = directory.diverged if diverged else directory.final
    publish_directory(place, about | {"steps": summary["steps"]}, save)
    written = json.dumps({key: finite(value) for key, value in summary.items()}, indent=2, allow_nan=False) + "\n"
    guarded(directory.summary, lambda: write_atomically(directory.summary, written))
    if diverged:
        print(f"error: {directory.told_of_divergence(diverged)}", file=sys.stderr, flush=True)
        return
    guarded(directory.diverged, lambda: delete(directory.diverged))
    print(table(directory, summary), flush=True)


def finite(value: Any) -> Any:
    """The value; None where it is a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
