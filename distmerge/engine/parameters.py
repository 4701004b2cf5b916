"""Theta of a worker that spans ranks: each rank merges a part of it, so that traffic between workers is n / shards per rank."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from distmerge.errors import UserError
from distmerge.theta.flat import FlatParameters, Slot, check_dtype, check_identity


class ReplicatedParameters(FlatParameters):
    """Parameters that every rank of a worker holds whole: each merges its own share, then they share the shares.

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
    """Give the ranks of a worker each other's shares, in place: an all-gather that needs no second buffer.

    Args:
        shares: one of each rank of the group; this rank's own is right.
    """
    for shard, share in enumerate(shares):
        dist.broadcast(share, dist.get_global_rank(inside, shard), group=inside)


class CopiedParameters(FlatParameters):
    """Parts of theta that lie elsewhere, in tensors of this rank: pull and push copy them.

    Args:
        layout: a slot for each parameter, in the model's order, with this rank's part of it.
        parameters: the parameters themselves, as the model and its optimizer know them.
        inside: process group of the worker's ranks.
    """

    def __init__(self, model: nn.Module, layout: list[Slot], parameters: Sequence[Tensor], inside: Any, device: torch.device):
        self._parameters = list(parameters)
        self.model, self.layout, self.inside, self.start = model, tuple(layout), inside, 0
        self.vector = self.whole = torch.empty(layout[-1].stop, dtype=torch.float32, device=device)
        self.pull()

    def stored(self) -> Iterator[Tensor]:
        """Where each slot's part lies: tensors of the slots' sizes, in the layout's order."""
        raise NotImplementedError

    @cached_property
    def stored_dtypes(self) -> tuple[torch.dtype, ...]:
        dtypes = tuple(tensor.dtype for tensor in self.stored())
        return () if set(dtypes) <= {torch.float32} else dtypes

    def refresh(self) -> None:
        """After the stored values changed: bring what was made from them up to date. A collective inside the worker."""
        raise NotImplementedError

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
        raise AssertionError("this rank holds parts of parameters: see parts()")


class ShardedParameters(CopiedParameters):
    """This rank's shards of a model under FSDP2's ``fully_shard``, which cuts each parameter along its first dim.

    Raises:
        UserError: for a parameter that is not sharded so.
    """

    def __init__(self, model: nn.Module):
        named = [(name, p) for name, p in sharded_parameters(model) if p.requires_grad]
        if not named:
            raise UserError("the model has no trainable parameter, so there is nothing to merge")
        # The modules show other tensors while they are gathered; the optimizer's are these.
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
        self.refresh()  # a module shows other tensors while it is gathered
        super().check()

    def stored(self) -> Iterator[Tensor]:
        return (p.to_local() for p in self._shards)

    def refresh(self) -> None:
        for module in self._modules:
            module.reshard()  # a module that is still gathered would compute with the old values


def sharded_parameters(model: nn.Module) -> list[tuple[str, DTensor]]:
    """The model's parameters as FSDP2 keeps them between steps.

    Raises:
        UserError: for one that FSDP2 does not hold.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    named: list[tuple[str, DTensor]] = []
    for name, parameter in model.named_parameters():
        if not isinstance(parameter, DTensor):
            raise UserError(f"parameter {name} must be sharded like the others: call fully_shard on the whole model, too")
        named.append((name, parameter))
    return named
