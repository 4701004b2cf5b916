"""The interface of engines: how one worker computes its inner steps and stores its parameters.

The trainer and the mergers depend on this interface only. Theta is ``engine.parameters``, which holds this rank's part of the
parameters as one vector. Checkpoint files hold parts of named parameters and their optimizer moments, so that a run with
another layout can read them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.config.train import TrainConfig
from distmerge.engine.stored import part_key
from distmerge.mesh import Mesh
from distmerge.theta.flat import FlatParameters

Read = Callable[[str], Any]
"""``read(name)`` returns the contents of a file of the checkpoint."""


class StepResult(NamedTuple):
    """The result of a worker's step, the same on all of its ranks. Tensors are scalars on the device, so reading one
    synchronizes with it.

    Attributes:
        loss: mean loss per token in nats, over all micro steps and ranks of the worker.
        grad_norm: L2 norm of the gradient before clipping.
        tokens: number of tokens that counted in the loss, over all micro steps and ranks of the worker. It is a plain number
            if it is the same at every step.
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor | float = 1.0


class Engine(ABC):
    """Base class of the engines, with the reading and writing of their checkpoint files.

    Attributes:
        model: computes the loss. If it is sharded, a forward pass is a collective inside the worker.
        parameters: theta; its vector is the part that this rank merges.
        optimizers: the inner optimizers.
        notes: lines to be logged at the start of the run.
    """

    model: nn.Module
    parameters: FlatParameters
    optimizers: list[torch.optim.Optimizer]

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.mesh, self.train_section = mesh, config.train
        self.notes: list[str] = []

    @abstractmethod
    def train_step(self, batch: Tensor, lr: float) -> StepResult:
        """Take one optimizer step.

        Args:
            batch: token ids, ``[micro_steps, batch, length]``.
            lr: the learning rate of this step.
        """

    def worker_result(self, loss: Tensor, grad_norm: Tensor, tokens: Tensor | float) -> StepResult:
        """Average loss and gradient norm over the ranks of the worker; a collective inside the worker.

        Args:
            loss: the mean over this rank's micro steps, weighted so that its mean over the ranks is the mean over all tokens.
            tokens: number of tokens of the whole worker that counted in the loss.
        """
        seen = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        if self.mesh.shards > 1:
            dist.all_reduce(seen, group=self.mesh.inside)
            seen /= self.mesh.shards
        return StepResult(seen[0], seen[1], tokens)

    def tokens_of(self, batch: Tensor) -> float:
        """Number of tokens of the whole worker that count in the loss of ``[micro_steps, batch, length]`` ids: all but the
        first of each sequence, which nothing predicts."""
        micro_steps, rows, length = batch.shape
        return float(micro_steps * rows * (length - 1) * self.mesh.shards)

    @abstractmethod
    def optimizer_state(self) -> Any:
        """The optimizer moments of this rank's part of the parameters, as an object for ``torch.save``."""

    @abstractmethod
    def load_optimizer_state(self, state: Any) -> None:
        """Restore what :meth:`optimizer_state` returned."""

    def shard_of(self, parameter: Tensor) -> Tensor:
        """This rank's part of a parameter of the model."""
        return parameter

    @property
    def replicated(self) -> bool:
        """Whether every rank of the worker holds the whole state, so that only one of them writes it."""
        return True

    @property
    def tag(self) -> str:
        """The part of a checkpoint file's name that identifies the worker, and the rank if the state is sharded."""
        return f"{self.mesh.worker:05}" if self.replicated else f"{self.mesh.worker:05}-{self.mesh.shard:05}"

    def state_files(self) -> dict[str, Any]:
        """The contents of this rank's checkpoint files by file name; empty if another rank writes them."""
        self.parameters.pull()
        if self.replicated and self.mesh.shard:
            return {}
        if self.replicated:
            tensors = {name: view.contiguous() for name, view in self.parameters.named_views()}
        else:
            vector = self.parameters.vector
            tensors = {
                part_key(part): vector[part.offset : part.offset + part.numel].clone() for part in self.parameters.parts()
            }
        tensors |= {f"buffer:{name}": buffer for name, buffer in self.model.named_buffers()}
        return {f"parameters-{self.tag}.safetensors": tensors, f"optimizer-{self.tag}.pt": self.optimizer_state()}

    @torch.no_grad()
    def load_state_files(self, read: Read) -> None:
        """Restore the files that this rank wrote in the same layout."""
        tensors = read(f"parameters-{self.tag}.safetensors")
        if self.replicated:
            for name, view in self.parameters.named_views():
                view.copy_(tensors[name])
        else:
            for part in self.parameters.parts():
                self.parameters.vector[part.offset : part.offset + part.numel].copy_(tensors[part_key(part)])
            self.parameters.push()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(tensors[f"buffer:{name}"])
        self.load_optimizer_state(read(f"optimizer-{self.tag}.pt"))

    def whole_state(self) -> dict[str, Tensor] | None:
        """The whole model's state_dict in float32 on the CPU, on the first rank of each worker, or None if ``model`` itself
        holds it. A collective inside the worker."""
        return None

    def close(self) -> None:
        """Release global state that would outlive the engine."""
        return  # most engines have none


def gather_whole(model: nn.Module, flat: FlatParameters, mesh: Mesh) -> dict[str, Tensor] | None:
    """Gather a sharded model's state_dict from the vectors of the worker's ranks.

    Returns:
        the state_dict on the worker's first rank, None on the others.
    """
    flat.pull()
    parts: list[list] = [[]] * mesh.shards
    dist.all_gather_object(parts, flat.parts(), group=mesh.inside)
    longest = max(sum(part.numel for part in rank_parts) for rank_parts in parts)
    padded = flat.vector.new_zeros(longest)
    padded[: flat.vector.numel()] = flat.vector
    leader = mesh.worker * mesh.shards
    received = [torch.empty_like(padded) for _ in range(mesh.shards)] if mesh.shard == 0 else None
    dist.gather(padded, received, dst=leader, group=mesh.inside)
    if received is None:
        return None
    whole = {slot.name: torch.zeros(slot.shape) for slot in flat.layout}
    for rank_parts, vector in zip(parts, received, strict=True):
        for part in rank_parts:
            values = vector[part.offset : part.offset + part.numel].cpu()
            whole[part.name].view(-1)[part.first : part.first + part.numel] = values
    return whole | remaining_state(model, whole)


def remaining_state(model: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """The entries of a state_dict that theta does not hold: further names of tied weights, frozen parameters and buffers.

    Args:
        whole: the trainable parameters, by the first name of each.
    """
    first_names: dict[int, str] = {}
    beside: dict[str, Tensor] = {}
    kept = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if name not in whole:
            beside[name] = whole[first] if first in whole else parameter.detach().cpu()
    beside |= {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in kept}
    return beside
