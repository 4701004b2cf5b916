"""Flattens any model: a plain module, one in DistributedDataParallel or under FSDP2, or a DeepSpeed engine."""

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
    """The model's trainable parameters, or this rank's part of them, as one vector. Flattening a plain float32 model twice
    gives the same vector."""
    if isinstance(model, FlatParameters):
        return model
    if isinstance(model, nn.parallel.DistributedDataParallel):
        if dist.get_world_size(model.process_group) == 1:
            return FlatParameters(model.module)
        return ReplicatedParameters(model.module, model.process_group)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return ShardedParameters(model)
    if "deepspeed" in sys.modules:
        from distmerge.engine.master_weights import is_engine, master_parameters

        if is_engine(model):
            return master_parameters(model)
    return FlatParameters(model)


def check_group(flat: FlatParameters, group: Any) -> None:
    """Refuse a process group for merges that has several ranks of one worker: they hold parts of one replica, not replicas.

    Raises:
        UserError: if ``group`` has more than one rank of this worker.
    """
    if flat.inside is None:
        return
    shared = set(dist.get_process_group_ranks(flat.inside)) & set(dist.get_process_group_ranks(group))
    if len(shared) > 1:
        raise UserError(
            f"group must have one rank of each worker, those that hold the same part of the model, got ranks "
            f"{sorted(shared)} of one worker; with a mesh of (worker, shard), pass mesh.get_group('worker')"
        )
