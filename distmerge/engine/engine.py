"""An engine: how one worker computes its inner steps and stores its parameters.

The trainer and the mergers know no more of it than this. Theta is ``engine.parameters``, this rank's part of it one vector;
its state on disk is parts of named parameters with their optimizer's moments, so that another layout can read them.
"""

from __future__ import annotations

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
"""``read(name)``: the contents of a checkpoint's file."""


class StepResult(NamedTuple):
    """What a worker's step did, the same on all of its ranks, as scalars on the device: reading them waits for it.

    Attributes:
        tokens: how many tokens counted in the loss, over all micro steps and ranks of the worker. A plain number where it is
            the same at every step.
    """

    loss: Tensor
    grad_norm: Tensor
    tokens: Tensor | float = 1.0


class Engine:
    """What the engines share: their files.

    Attributes:
        model: what computes a loss; forward passes are collectives inside the worker where it is sharded.
        parameters: theta, as this rank merges it.
        optimizers: the inner optimizers.
        notes: what the log should say of it.
    """

    model: nn.Module
    parameters: FlatParameters
    optimizers: list[torch.optim.Optimizer]

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.mesh, self.train_section = mesh, config.train
        self.notes: list[str] = []

    def train_step(self, batch: Tensor, lr: float) -> StepResult:
        """One optimizer step on ``[micro_steps, batch, length]`` token ids; the mean loss over all tokens of the worker that
        count."""
        raise NotImplementedError

    def of_worker(self, loss: Tensor, grad_norm: Tensor, tokens: Tensor | float) -> StepResult:
        """A step's result from this rank's part of it; a collective inside the worker.

        Args:
            loss: the mean over this rank's micro steps, weighted so that the mean over the ranks is one over tokens.
            tokens: of the whole worker, that counted in the loss.
        """
        seen = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        if self.mesh.shards > 1:
            dist.all_reduce(seen, group=self.mesh.inside)
            seen /= self.mesh.shards
        return StepResult(seen[0], seen[1], tokens)

    def tokens_of(self, batch: Tensor) -> float:
        """Tokens of the whole worker that count in the loss of ``[micro_steps, batch, length]`` ids, where every token does but
        the first of each sequence."""
        micro_steps, rows, length = batch.shape
        return float(micro_steps * rows * (length - 1) * self.mesh.shards)

    def optimizer_state(self) -> Any:
        """The moments of this rank's parts, for torch.save."""
        raise NotImplementedError

    def load_optimizer_state(self, state: Any) -> None:
        raise NotImplementedError

    def shard_of(self, parameter: Tensor) -> Tensor:
        """What this rank holds of a parameter."""
        return parameter

    @property
    def replicated(self) -> bool:
        """Whether every rank of the worker holds all of it, so that one of them writes the files."""
        return True

    @property
    def tag(self) -> str:
        """The part of file names that says whose state a file holds."""
        return f"{self.mesh.worker:05}" if self.replicated else f"{self.mesh.worker:05}-{self.mesh.shard:05}"

    def state_files(self) -> dict[str, Any]:
        """This rank's checkpoint files by name."""
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
        """Restore what this rank, in this layout, wrote."""
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
        """The whole model's state_dict in float32 on the CPU, on the first rank of each worker; a collective inside the
        worker. None where the model itself holds it."""
        return None

    def close(self) -> None:
        """Give back what the process would keep."""


def gather_whole(model: nn.Module, flat: FlatParameters, mesh: Mesh) -> dict[str, Tensor] | None:
    """A sharded model's state_dict from the ranks' vectors, on the worker's first rank; None on the others."""
    flat.pull()
    parts: list[list] = [[]] * mesh.shards
    dist.all_gather_object(parts, flat.parts(), group=mesh.inside)
    longest = max(sum(part.numel for part in theirs) for theirs in parts)
    padded = flat.vector.new_zeros(longest)
    padded[: flat.vector.numel()] = flat.vector
    leader = mesh.worker * mesh.shards
    received = [torch.empty_like(padded) for _ in range(mesh.shards)] if mesh.shard == 0 else None
    dist.gather(padded, received, dst=leader, group=mesh.inside)
    if received is None:
        return None
    whole = {slot.name: torch.zeros(slot.shape) for slot in flat.layout}
    for theirs, vector in zip(parts, received, strict=True):
        for part in theirs:
            values = vector[part.offset : part.offset + part.numel].cpu()
            whole[part.name].view(-1)[part.first : part.first + part.numel] = values
    return whole | names_beside(model, whole)


def names_beside(model: nn.Module, whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """What else a state_dict holds: the other names of tied weights, frozen parameters, buffers."""
    first_names: dict[int, str] = {}
    beside: dict[str, Tensor] = {}
    kept = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        first = first_names.setdefault(id(parameter), name)
        if name not in whole:
            beside[name] = whole[first] if first in whole else parameter.detach().cpu()
    beside |= {name: buffer.detach().cpu() for name, buffer in model.named_buffers() if name in kept}
    return beside
