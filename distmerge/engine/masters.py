"""DeepSpeed's float32 masters: what a merge must read and write, or the next step undoes it.

ZeRO (https://arxiv.org/abs/1910.02054) cuts the masters into flat partitions, one of each group of parameters on this rank.
They are reached by names that are private to DeepSpeed, all of them in this file. Of a version that is not in VERIFIED, or
where a name is gone, DeepSpeed's public functions read and write whole parameters one by one: slower, with the model on
every rank, and said in the log.
"""

from __future__ import annotations

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
"""Versions of DeepSpeed whose private names are known to mean what this file takes them for."""


@dataclass(frozen=True)
class Fragment:
    """Where this rank's part of a parameter lies: ``partition[at : at + numel]`` is elements [first, first + numel) of it."""

    partition: int
    at: int
    first: int
    numel: int


def is_engine(model: nn.Module) -> bool:
    import deepspeed

    return isinstance(model, deepspeed.DeepSpeedEngine)


def master_parameters(engine: Any, by_parameter: bool = False) -> FlatParameters:
    """Theta of a DeepSpeed engine, as this rank merges it.

    Args:
        by_parameter: take DeepSpeed's public functions where private names would be faster.

    Raises:
        UserError: for masters that are not in memory.
    """
    inside = engine.seq_data_parallel_group
    optimizer = engine.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):  # stage 0 in float32: there is nothing but the model
        return ReplicatedParameters(engine.module, inside)
    if hasattr(optimizer, "fp32_groups"):  # stage 0 in bfloat16: a master for each parameter, on every rank
        return PairedMasterWeights(engine.module, inside, optimizer.fp32_groups, optimizer.fp16_groups)
    if not by_parameter and verified():
        stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
        return ShardedMasterWeights(engine) if stage3 else PartitionedMasterWeights(engine)
    return PublicMasterWeights(engine.module, inside)


def verified() -> bool:
    import deepspeed

    return deepspeed.__version__.startswith(VERIFIED)


class FlatMasterWeights(CopiedParameters):
    """This rank's partitions as one vector, in the model's order."""

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
            raise UserError("DeepSpeed's masters must be in memory to be merged, but some are swapped out")
        super().__init__(module, layout, parameters, engine.seq_data_parallel_group, self.partitions()[0].device)

    def partitions(self) -> list[Tensor]:
        """The flat float32 masters of this rank."""
        raise NotImplementedError

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        """Where this rank's part of a parameter lies, if it has one."""
        raise NotImplementedError

    def stored(self) -> Iterator[Tensor]:
        partitions = self.partitions()
        for fragment in self._fragments:
            yield partitions[fragment.partition].detach()[fragment.at : fragment.at + fragment.numel]


class PartitionedMasterWeights(FlatMasterWeights):
    """Stages 1 and 2: each rank keeps the masters of a stretch of each flattened group."""

    def partitions(self) -> list[Tensor]:
        if hasattr(self.optimizer, "single_partition_of_fp32_groups"):
            return self.optimizer.single_partition_of_fp32_groups
        return self.optimizer.fp32_groups_flat_partition  # stage 1 in bfloat16 that accumulates gradients in float32

    def fragment(self, parameter: nn.Parameter) -> Fragment | None:
        mapping = parameter._hp_mapping  # pyright: ignore[reportAttributeAccessIssue]
        if mapping is None:
            return None
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Fragment(mapping.param_group_index, there.start, here.start, here.numel)  # pyright: ignore

    def refresh(self) -> None:
        """What DeepSpeed's own ``update_lp_params`` does, without a second buffer: through gloo in half of its time."""
        cut = getattr(self.optimizer, "parallel_partitioned_bit16_groups", None) or self.optimizer.bf16_partitioned_groups
        for partitions, master in zip(cut, self.partitions(), strict=True):
            shares = [partition.detach() for partition in partitions]
            shares[dist.get_rank(self.inside)].copy_(master.detach())
            exchange(shares, self.inside)


class ShardedMasterWeights(FlatMasterWeights):
    """Stage 3: each parameter is cut evenly; a rank's cuts of a group of parameters lie end to end."""

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
        self.optimizer._partition_all_parameters()  # let go of what is gathered: it has the old values
        for index in range(len(self.partitions())):
            self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        kept = self.optimizer.persistent_parameters
        if kept:  # small parameters stay gathered between steps
            kept[0].all_gather(kept)


class PairedMasterWeights(ReplicatedParameters):
    """A float32 master beside each 16-bit parameter, both whole on every rank."""

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
    """Masters by DeepSpeed's public functions, whole and one by one: for versions whose partitions are not known."""

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
            if hasattr(parameter, "ds_id"):  # at stage 3 its setter of whole values fails where the ranks don't divide them
                even = nn.functional.pad(view.reshape(-1), (0, -view.numel() % len(self.shares)))
                safe_set_local_fp32_param(parameter, even.chunk(len(self.shares))[dist.get_rank(self.inside)])
            else:
                safe_set_full_fp32_param(parameter, view)
            with self._zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(view)
