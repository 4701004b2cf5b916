"""DeepSpeed's float32 master weights. A merge must read and write them: DeepSpeed's next step overwrites the model's own 16-bit
parameters with values from its masters.

ZeRO (https://arxiv.org/abs/1910.02054) flattens each group of parameters and keeps one partition of it on each rank. The
partitions can be reached only through private names of DeepSpeed, which only this file uses. For versions that are not in
VERIFIED, DeepSpeed's public functions are used: they read and write whole parameters one by one, which is slower and needs
memory for the whole model on every rank. The log then says so.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.engine.parameters import CopiedParameters, ReplicatedParameters, exchange
from distmerge.errors import UserError
from distmerge.theta.flat import FlatParameters, Slot

VERIFIED = ("0.19",)
"""Versions of DeepSpeed whose private names are known to mean what this file assumes."""


@dataclass(frozen=True)
class Fragment:
    """Where this rank's part of a parameter lies: elements [first, first + numel) of the flattened parameter are
    ``partitions()[partition][at : at + numel]``."""

    partition: int
    at: int
    first: int
    numel: int


def is_engine(model: nn.Module) -> bool:
    import deepspeed

    return isinstance(model, deepspeed.DeepSpeedEngine)


def master_parameters(engine: Any, by_parameter: bool = False) -> FlatParameters:
    """The master weights of a DeepSpeed engine as flat parameters.

    Args:
        by_parameter: use DeepSpeed's public functions even if the faster private names could be used.

    Raises:
        UserError: if DeepSpeed has swapped the masters out of memory.
    """
    inside = engine.seq_data_parallel_group
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0 in float32: the model's parameters are the masters
        return ReplicatedParameters(engine.module, inside)
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in bfloat16: every rank has a master for each parameter
        return PairedMasterWeights(engine.module, inside, optimizer.fp32_groups, optimizer.fp16_groups)
    if not by_parameter and verified():
        stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        return ShardedMasterWeights(engine) if stage3 else PartitionedMasterWeights(engine)
    return PublicMasterWeights(engine.module, inside)


def verified() -> bool:
    import deepspeed

    return deepspeed.__version__.startswith(VERIFIED)


class FlatMasterWeights(CopiedParameters):
    """This rank's partitions as one vector, in the order of the model's parameters."""

    def __init__(self, engine: Any):
        self.optimizer = engine.optimizer
        module, layout, parameters = engine.module, [], []
        self._fragments: list[Fragment] = []
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            fragment = self.fragment(parameter) or Fragment(0, 0, 0, 0)
            offset = layout[-1].stop if layout else 0
            layout.append(
                Slot(name, tuple(getattr(parameter, "ds_shape", parameter.shape)), offset, fragment.first, fragment.numel)
            )
            parameters.append(parameter)
            self._fragments.append(fragment)
        if any(partition.numel() == 0 for partition in self.partitions()):
            raise UserError("DeepSpeed's master weights must be in memory to be merged, but some are swapped out")
        super().__init__(module, layout, parameters, engine.seq_data_parallel_group, self.partitions()[0].device)

    @abstractmethod
    def partitions(self) -> list[Tensor]:
        """This rank's flat float32 partitions, one for each group of parameters."""

    @abstractmethod
    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Where this rank's part of a parameter lies; None if the rank has no part of it."""

    def stored(self) -> Iterator[Tensor]:
        partitions = self.partitions()
        for fragment in self._fragments:
            yield partitions[fragment.partition].detach()[fragment.at : fragment.at + fragment.numel]


class PartitionedMasterWeights(FlatMasterWeights):
    """Stages 1 and 2: a group's parameters are flattened end to end and the result is cut evenly, so a rank's partition holds
    some whole parameters and parts of the ones at its ends."""

    def partitions(self) -> list[Tensor]:
        if hasattr(self.optimizer, "single_partition_of_fp32_groups"):
            return self.optimizer.single_partition_of_fp32_groups
        return self.optimizer.fp32_groups_flat_partition  # stage 1 in bfloat16 with gradients accumulated in float32

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(mapping.param_group_index, there.start, here.start, here.numel)  # pyright: ignore

    def refresh(self) -> None:
        """Copy the masters into the 16-bit parameters, as DeepSpeed's ``update_lp_params`` does, but without a second buffer.
        With gloo this takes half the time."""
        cut = getattr(self.optimizer, "parallel_partitioned_bit16_groups", None) or self.optimizer.bf16_partitioned_groups
        for partitions, master in zip(cut, self.partitions(), strict=True):
            shares = [partition.detach() for partition in partitions]
            shares[dist.get_rank(self.inside)].copy_(master.detach())
            exchange(shares, self.inside)


class ShardedMasterWeights(FlatMasterWeights):
    """Stage 3: each parameter is cut evenly, and a rank's partition holds its parts of a group's parameters end to end.

    With 2 ranks and parameters of 5 and 4 elements, the parts have 3 and 2 elements: rank 0 holds elements 0 to 2 of the first
    and 0 to 1 of the second; rank 1 holds elements 3 to 4 of the first, one element of padding, and 2 to 3 of the second.
    """

    def __init__(self, engine: Any):
        self._places: dict[int, Fragment] = {}
        for index, group in enumerate(engine.optimizer.fp16_groups):
            at = 0
            for parameter in group:
                size, numel = parameter.partition_numel(), parameter.ds_numel
                first = min(dist.get_rank(engine.seq_data_parallel_group) * size, numel)
                self._places[id(parameter)] = Fragment(index, at, first, min(size, numel - first))
                at += size
        super().__init__(engine)

    def partitions(self) -> list[Tensor]:
        return self.optimizer.fp32_partitioned_groups_flat

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        return self._places[id(parameter)]

    def refresh(self) -> None:
        self.optimizer._partition_all_parameters()  # frees gathered parameters, which have the old values
        for index in range(len(self.partitions())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        kept = self.optimizer.persistent_parameters
        if kept:  # small parameters stay gathered between steps
            kept[0].all_gather(kept)


class PairedMasterWeights(ReplicatedParameters):
    """Stage 0 in bfloat16: every rank holds each 16-bit parameter and its float32 master whole."""

    has_masters = True

    def __init__(self, model: nn.Module, inside: Any, masters: list[list[Tensor]], halves: list[list[nn.Parameter]]):
        flat_masters = [master for group in masters for master in group]
        flat_halves = [half for group in halves for half in group]
        self._masters = {id(half): master for half, master in zip(flat_halves, flat_masters, strict=True)}
        super().__init__(model, inside)
        self.pull()

    @torch.no_grad()
    def _copy(self, into_model: bool) -> None:
        for (_, view), parameter in zip(self.named_views(), self._parameters, strict=True):
            master = self._masters[id(parameter)]
            if into_model:
                master.copy_(view)
                parameter.copy_(view)
            else:
                view.copy_(master)


class PublicMasterWeights(ReplicatedParameters):
    """Reads and writes whole masters one by one through DeepSpeed's public functions, for versions that are not verified."""

    in_place = False
    has_masters = True

    def __init__(self, model: nn.Module, inside: Any):
        import deepspeed

        self._zero = deepspeed.zero
        with self._zero.GatheredParameters(list(model.parameters())):
            super().__init__(model, inside)
        self.pull()

    @torch.no_grad()
    def _copy(self, into_model: bool) -> None:
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param, safe_set_local_fp32_param

        for (name, view), parameter in zip(self.named_views(), self._parameters, strict=True):
            if not into_model:
                master = safe_get_full_fp32_param(parameter)
                assert master is not None, f"DeepSpeed has no master of {name}"
                view.copy_(master.view(view.shape))
                continue
            if hasattr(parameter, "ds_id"):  # stage 3: the setter of whole values fails if the size is no multiple of the ranks
                even = nn.functional.pad(view.reshape(-1), (0, -view.numel() % len(self.shares)))
                safe_set_local_fp32_param(parameter, even.chunk(len(self.shares))[dist.get_rank(self.inside)])
            else:
                safe_set_full_fp32_param(parameter, view)
            with self._zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(view)
