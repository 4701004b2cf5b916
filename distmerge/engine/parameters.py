"""Flat parameters of a worker that spans several ranks. Each rank merges a part of theta, so its traffic with other workers is
n / shards elements instead of n."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from distmerge.errors import UserError
from distmerge.theta.checks import check_dtype, check_identity
from distmerge.theta.flat import FlatParameters, Slot


class ReplicatedParameters(FlatParameters):
    """Parameters of which every rank of the worker holds a whole copy. Each rank merges one share of the vector; push() then
    exchanges the shares between the ranks.

    Args:
        inside: process group of the worker's ranks.
    """

    def __init__(self, model: nn.Module, inside: Any):
        super().__init__(model)
        self.inside = inside
        numel, shards, shard = self.whole.numel(), dist.get_world_size(inside), dist.get_rank(inside)
        bounds = [numel * index // shards for index in range(shards + 1)]
        self.shares = [self.whole[start:stop] for start, stop in itertools.pairwise(bounds)]
        self.vector, self.start = self.shares[shard], bounds[shard]

    def push(self) -> None:
        exchange(self.shares, self.inside)
        super().push()


def exchange(shares: list[Tensor], inside: Any) -> None:
    """Exchange the shares between a worker's ranks in place: an all-gather that needs no second buffer.

    Args:
        shares: one for each rank of the group. Only this rank's own needs to hold its values; the others are overwritten.
    """
    for shard, share in enumerate(shares):
        dist.broadcast(share, dist.get_global_rank(inside, shard), group=inside)


class CopiedParameters(FlatParameters, ABC):
    """Parts of theta that an engine stores in tensors of its own. The vector is a copy: pull() fills it, push() writes it back.

    Args:
        layout: a slot for each parameter, in the model's order, with this rank's part of it.
        parameters: the model's own parameters, in the same order.
        inside: process group of the worker's ranks.
    """

    def __init__(self, model: nn.Module, layout: list[Slot], parameters: Sequence[Tensor], inside: Any, device: torch.device):
        self._parameters = list(parameters)
        self.model, self.layout, self.inside, self.start = model, tuple(layout), inside, 0
        self.vector = self.whole = torch.empty(layout[-1].stop, dtype=torch.float32, device=device)
        self.pull()

    @abstractmethod
    def stored(self) -> Iterator[Tensor]:
        """The engine's tensor for each slot, of the slot's size, in the layout's order."""

    @cached_property
    def stored_dtypes(self) -> tuple[torch.dtype, ...]:
        dtypes = tuple(tensor.dtype for tensor in self.stored())
        return () if set(dtypes) <= {torch.float32} else dtypes

    @abstractmethod
    def refresh(self) -> None:
        """Update what the engine derives from the stored tensors, such as 16-bit copies, after they have changed. A collective
        inside the worker."""

    def check(self) -> None:
        check_identity(self.model, [slot.name for slot in self.layout], self._parameters)

    @torch.no_grad()
    def pull(self) -> None:
        self.check()
        for slot, tensor in zip(self.layout, self.stored(), strict=True):
            self.vector[slot.offset : slot.stop].copy_(tensor.reshape(-1))

    @torch.no_grad()
    def push(self) -> None:
        for slot, tensor in zip(self.layout, self.stored(), strict=True):
            tensor.copy_(self.vector[slot.offset : slot.stop].view(tensor.shape))
        self.refresh()

    def named_views(self) -> Iterator[tuple[str, Tensor]]:
        raise AssertionError("this rank holds only parts of the parameters; use parts()")


class ShardedParameters(CopiedParameters):
    """This rank's shards of a model under FSDP2's ``fully_shard``, which cuts each parameter along its first dim.

    A parameter of shape ``[5, 4]`` over 2 ranks is cut into 3 and 2 rows: on rank 1 its slot has ``first`` 12 and ``part`` 8.

    Raises:
        UserError: for a parameter that is sharded in another way.
    """

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in sharded_parameters(model) if p.requires_grad]
        if not named:
            raise UserError("the model has no trainable parameter, so there is nothing to merge")
        # Kept, since a module shows other tensors while it is gathered. The optimizer holds these.
        self._shards = [p for _, p in named]
        self._modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
        mesh = self._shards[0].device_mesh
        layout: list[Slot] = []
        for name, p in named:
            check_dtype(name, p)
            if p.device_mesh != mesh or mesh.ndim != 1 or tuple(p.placements) != (Shard(0),):
                raise UserError(f"parameter {name} must be sharded along dim 0 over one axis, got {p.placements} over {mesh}")
            row = math.prod(p.shape[1:])
            first = min(mesh.get_local_rank() * math.ceil(p.shape[0] / mesh.size()), p.shape[0]) * row
            offset = layout[-1].stop if layout else 0
            layout.append(Slot(name, tuple(p.shape), offset, first, p.to_local().numel()))
        super().__init__(model, layout, self._shards, mesh.get_group(), self._shards[0].to_local().device)

    def check(self) -> None:
        self.refresh()  # a gathered module shows other tensors than those that were laid out
        super().check()

    def stored(self) -> Iterator[Tensor]:
        return (p.to_local() for p in self._shards)

    def refresh(self) -> None:
        for module in self._modules:
            module.reshard()  # a module that stays gathered would compute with the old values


def sharded_parameters(model: nn.Module) -> list[tuple[str, DTensor]]:
    """The model's parameters in the sharded form in which FSDP2 keeps them between steps.

    Raises:
        UserError: for a parameter that FSDP2 does not manage.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named: list[tuple[str, DTensor]] = []
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise UserError(f"parameter {name} must be sharded like the others: call fully_shard on the whole model as well")
        named.append((name, parameter))
    return named
