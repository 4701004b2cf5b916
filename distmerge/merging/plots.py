"""Plots of a diagnosis: a heat map of the cosines and a profile over the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from distmerge.merging.diagnosis import Diagnosis

matplotlib.use("Agg")


def draw(report: Diagnosis, out: Path) -> None:
    """Write cosines.png and layers.png into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(report).items():
        cast(Any, figure).savefig(out / f"{name}.png", dpi=120)


def figures(report: Diagnosis) -> dict[str, Figure]:
    """The plots, by name."""
    return {"cosines": heat_map(report), "layers": profile(report)}


def heat_map(report: Diagnosis) -> Figure:
    """The cosines between the task vectors, as a matrix of colours."""
    cosines = np.asarray(report.whole.cosines)
    labels = [Path(model).name for model in report.models]
    figure = Figure(figsize=(2 + 0.8 * len(labels), 1.5 + 0.8 * len(labels)), layout="constrained")
    axes = cast(Any, figure.add_subplot())
    image = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    for (row, column), value in np.ndenumerate(cosines):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center")
    axes.set_title("cosine between task vectors")
    cast(Any, figure).colorbar(image)
    return figure


def profile(report: Diagnosis) -> Figure:
    """The mean cosine, the sign conflicts and the norms over the layers."""
    layers = list(report.layers.values())
    figure = Figure(figsize=(8, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    count = len(report.models)
    pairs = np.triu_indices(count, 1)
    above.plot([np.asarray(layer.cosines)[pairs].mean() for layer in layers], label="mean cosine")
    above.plot([layer.conflict_mass for layer in layers], label="sign conflict, by mass")
    above.plot([layer.conflict_count for layer in layers], label="sign conflict, by count")
    above.legend()
    for index, model in enumerate(report.models):
        below.plot([layer.norms[index] for layer in layers], label=Path(model).name)
    below.set_ylabel("norm of the task vector")
    below.set_xlabel("layer")
    below.legend()
    return figure


def to_tensorboard(report: Diagnosis, out: Path) -> None:
    """Write the plots, and each layer's scalars with the layer as the step, into a TensorBoard directory ``out``."""
    from torch.utils.tensorboard import SummaryWriter

    writer = cast(Any, SummaryWriter(str(out)))
    for name, figure in figures(report).items():
        writer.add_figure(f"diagnose/{name}", figure)
    for step, layer in enumerate(report.layers.values()):
        writer.add_scalar("diagnose/conflict_mass", layer.conflict_mass, step)
        writer.add_scalar("diagnose/conflict_count", layer.conflict_count, step)
        writer.add_scalar("diagnose/lost_to_rounding", layer.lost_to_rounding, step)
    writer.close()
