"""Theta of any model as one vector: a plain module, one in DistributedDataParallel, under FSDP2, or a DeepSpeed engine."""

from __future__ import annotations

import sys
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from distmerge.engine.parameters import ReplicatedParameters, ShardedParameters
from distmerge.errors import UserError
from distmerge.theta.flat import FlatParameters


def flatten(model: nn.Module | FlatParameters) -> FlatParameters:
    """The model's parameters as one vector, or this rank's part of them. Laying out twice gives the same vector."""
    if isinstance(model, FlatParameters):
        return model
    if isinstance(model, nn.parallel.DistributedDataParallel):
        if dist.get_world_size(model.process_group) == 1:
            return FlatParameters(model.module)
        return ReplicatedParameters(model.module, model.process_group)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return ShardedParameters(model)
    if "deepspeed" in sys.modules:
        from distmerge.engine.masters import is_engine, master_parameters

        if is_engine(model):
            return master_parameters(model)
    return FlatParameters(model)


def check_peers(flat: FlatParameters, group: Any) -> None:
    """Refuse to merge ranks that hold theta together as if each held one of its own.

    Raises:
        UserError: where ``group`` has more than one rank of this worker.
    """
    if flat.inside is None:
        return
    together = set(dist.get_process_group_ranks(flat.inside)) & set(dist.get_process_group_ranks(group))
    if len(together) > 1:
        raise UserError(
            f"group must be one rank of each worker, those that hold the same part of the model, got ranks "
            f"{sorted(together)} of one worker; with a mesh of (worker, shard), pass mesh.get_group('worker')"
        )
