"""Checks that a model is finite before it is published. Each rank holds a part of the model, so the check is a collective."""

from __future__ import annotations

import torch
import torch.distributed as dist

from distmerge.finite import has_nan, nonfinite
from distmerge.mesh import Mesh
from distmerge.theta.flat import FlatParameters


@torch.no_grad()
def health_problem(flat: FlatParameters, mesh: Mesh) -> str | None:
    """Why the model is unhealthy, as a phrase that is the same on all ranks, or None if it is healthy.

    Parameters must be finite. Buffers may hold infinities, as masks do, but not NaN.
    """
    flat.pull()
    buffers = float(any(has_nan(buffer) for buffer in flat.model.buffers()))
    found = torch.stack([nonfinite(flat.vector), flat.vector.new_tensor(buffers)]).to(mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    for unhealthy, name in zip(found.tolist(), ("parameters", "buffers"), strict=True):
        if unhealthy:
            return f"its {name} are not finite"
    return None
