"""Whether a model can be published: nothing in it that is not finite. A collective, since each rank holds a part."""

from __future__ import annotations

import torch
import torch.distributed as dist

from distmerge.finite import has_nan, nonfinite
from distmerge.mesh import Mesh
from distmerge.theta.flat import FlatParameters


@torch.no_grad()
def health_problem(flat: FlatParameters, mesh: Mesh) -> str | None:
    """What is not finite in the model as it stands, in words, or None; the same on all ranks.

    A buffer may hold infinities, as masks do, and must not hold NaN.
    """
    flat.pull()
    buffers = float(any(has_nan(buffer) for buffer in flat.model.buffers()))
    found = torch.stack([nonfinite(flat.vector), flat.vector.new_tensor(buffers)]).to(mesh.device)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    for unhealthy, name in zip(found.tolist(), ("parameters", "buffers"), strict=True):
        if unhealthy:
            return f"its {name} are not finite"
    return None
