"""FSDP2 (https://arxiv.org/abs/2304.11277, torch's ``fully_shard``): parameters, gradients and optimizer moments are sharded
over the worker's ranks.

Each block of the model is gathered while it computes. The flat vector consists of this rank's shards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from distmerge.config.train import TrainConfig
from distmerge.data.loss_mask import ids_and_labels
from distmerge.engine.engine import gather_whole
from distmerge.engine.parameters import ShardedParameters
from distmerge.engine.torch import TorchEngine
from distmerge.mesh import Mesh
from distmerge.theta.layers import blocks_of


class FSDPEngine(TorchEngine):
    """Computes inner steps with sharded parameters, gradients and optimizer state."""

    forward: FSDPModule

    def __init__(self, model: nn.Module, config: TrainConfig, mesh: Mesh):
        self.reshard = config.engine.reshard_after_forward
        super().__init__(model, config, mesh)

    def _distribute(self) -> nn.Module:
        axis = self.mesh.shard_axis()
        bfloat16 = self.train_section.precision == "bfloat16"
        # Gradients are summed in float32 even if the blocks compute in bfloat16.
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
        for block in blocks(self.model):
            self._shard(block, axis, policy)
        self._shard(self.model, axis, policy)
        self.parameters = ShardedParameters(self.model)
        return self.model

    def _shard(self, module: nn.Module, axis: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        fully_shard(module, mesh=axis, mp_policy=policy, reshard_after_forward=self.reshard)

    def _loss_of(self, batch: Tensor) -> Tensor:
        ids, labels = ids_and_labels(batch)
        return self.model(input_ids=ids, labels=labels, use_cache=False).loss.float()

    def _reducing(self, last: bool) -> contextlib.AbstractContextManager:
        self.forward.set_requires_gradient_sync(last)
        return contextlib.nullcontext()

    def _clip(self, limit: float) -> Tensor:
        grads = [local(p.grad) for p in self._trainable if p.grad is not None]
        square = nn.utils.get_total_norm(grads).square()
        dist.all_reduce(square, group=self.mesh.inside)
        grad_norm = square.sqrt()
        if limit:
            factor = torch.clamp(limit / (grad_norm + 1e-6), max=1.0)
            for grad in grads:
                grad.mul_(factor)
        return grad_norm

    def shard_of(self, parameter: Tensor) -> Tensor:
        return local(parameter)

    @property
    def replicated(self) -> bool:
        return False

    def optimizer_state(self) -> list[dict[str, Any]]:
        """The optimizers' state_dicts, with this rank's shard in place of each DTensor."""
        states = super().optimizer_state()
        for state in states:
            state["state"] = {
                index: {key: local(value) for key, value in moments.items()} for index, moments in state["state"].items()
            }
        return states

    def load_optimizer_state(self, state: list[dict[str, Any]]) -> None:
        for optimizer, stored in zip(self.optimizers, state, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            whole = {
                index: {key: sharded_like(parameters[index], value) for key, value in moments.items()}
                for index, moments in stored["state"].items()
            }
            optimizer.load_state_dict(stored | {"state": whole})

    def whole_state(self) -> dict[str, Tensor] | None:
        return gather_whole(self.model, self.parameters, self.mesh)


def blocks(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of all lists of blocks, such as an encoder's and a decoder's, in the order of the model's parameters."""
    places = blocks_of(name for name, _ in model.named_parameters()).values()
    for place in dict.fromkeys(places):
        yield model.get_submodule(f"{place.list}{place.index}")


def local(tensor: Any) -> Any:
    """This rank's shard of a DTensor; any other value is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: DTensor, shard: Any) -> Any:
    """A moment as a DTensor that is sharded like its parameter. Values that are not shards, such as the number of steps, are
    returned as they are."""
    if not isinstance(shard, Tensor) or shard.numel() != parameter.to_local().numel() or shard.ndim != parameter.ndim:
        return shard
    return DTensor.from_local(
        shard.to(parameter.device),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
