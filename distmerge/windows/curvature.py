"""The curvature's diagonal, estimated by Adam's second moments: it says in which directions a distance costs loss.

The second moments are running means of squared gradients. Near a minimum they are about proportional to the diagonal of the
Fisher information (https://arxiv.org/abs/1412.6980). In distances weighted by them, the flat directions in which a run drifts
count for little, and the steep ones in which it is noisy count for much.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distmerge.checkpoints.store import published_checkpoints
from distmerge.files.directories import verify
from distmerge.files.header import read_header


class Curvature(NamedTuple):
    """The second moments of one checkpoint.

    Attributes:
        source: the checkpoint's name.
        diagonal: for each parameter, by name, its second moments as a flat ``[numel]`` tensor, memory-mapped from the file.
        mean: over the elements of all parameters.
    """

    source: str
    diagonal: dict[str, Tensor]
    mean: float


def newest_curvature(run_dir: Path) -> Curvature | None:
    """The second moments of the first worker in the newest checkpoint. None if that checkpoint is missing, damaged, sharded, or
    written with another optimizer than a single AdamW."""
    checkpoints = published_checkpoints(run_dir / "checkpoints")
    moments = checkpoints[-1] / "optimizer-00000.pt" if checkpoints else None
    if moments is None or not moments.is_file() or verify(checkpoints[-1]) is not None:
        return None
    tensors = read_header(checkpoints[-1] / "parameters-00000.safetensors").tensors
    # The optimizer numbers parameters group by group: first those with weight decay (at least 2 dimensions), then the others,
    # each in the model's order. See distmerge.engine.optimizers.parameter_groups.
    entries = sorted(
        ((name, entry) for name, entry in tensors.items() if not name.startswith("buffer:")),
        key=lambda item: len(item[1].shape) < 2,
    )
    states = torch.load(moments, map_location="cpu", weights_only=True, mmap=True)
    found = [state.get("exp_avg_sq") for _, state in sorted(states[0]["state"].items())]
    if len(states) != 1 or [None if v is None else tuple(v.shape) for v in found] != [entry.shape for _, entry in entries]:
        return None
    mean = sum(float(v.sum(dtype=torch.float64)) for v in found) / sum(v.numel() for v in found)
    return Curvature(checkpoints[-1].name, {name: v.view(-1) for (name, _), v in zip(entries, found, strict=True)}, mean)
