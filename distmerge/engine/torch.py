"""The plain torch engine: a whole replica on each rank, DistributedDataParallel where a worker has several."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.config import Optimizer, TrainConfig
from distmerge.flat import FlatParameters
from distmerge.labels import ids_and_labels, micro_weights
from distmerge.mesh import Mesh


class StepResult(NamedTuple):
    """What a step did, as scalars on the device: reading them waits for it."""

    loss: Tensor
    grad_norm: Tensor


class TorchEngine:
    """Computes inner steps. The optimizer works on views of the flat vector."""

    def __init__(self, model: nn.Module, config: TrainConfig, mesh: Mesh):
        self.mesh, self.train_section, self.uneven = mesh, config.train, config.data.format != "text"
        self.model = model.to(mesh.device)
        self.parameters = ReplicatedParameters(self.model, mesh) if mesh.shards > 1 else FlatParameters(self.model)
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self.forward: nn.Module = self.model
        if mesh.shards > 1:
            devices = [mesh.device] if mesh.device.type == "cuda" else None
            self.forward = nn.parallel.DistributedDataParallel(self.model, device_ids=devices, process_group=mesh.inside)
        self._loss = torch.compile(self._loss_of) if config.train.compile else self._loss_of
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]

    def train_step(self, batch: Tensor, lr: float) -> StepResult:
        """One optimizer step on ``[micro_steps, batch, length]`` token ids."""
        self.model.train()
        batch = batch.to(self.mesh.device, non_blocking=True)
        loss = torch.zeros((), device=self.mesh.device)
        weights = self._weights(batch)
        for index, micro_batch in enumerate(batch):
            with self._reducing(index == len(batch) - 1):
                micro_loss = self._loss(micro_batch) / len(batch)
                micro_loss = micro_loss if weights is None else micro_loss * weights[index]
                micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = nn.utils.get_total_norm(p.grad for p in self._trainable if p.grad is not None)
        if self.train_section.gradient_clip:
            nn.utils.clip_grads_with_norm_(self._trainable, self.train_section.gradient_clip, grad_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return StepResult(loss, grad_norm)

    def _weights(self, batch: Tensor) -> Tensor | None:
        """What makes a mean over micro steps and ranks one over tokens, where examples have different numbers of them."""
        if not self.uneven:
            return None
        return micro_weights(batch, self.mesh.inside if self.mesh.shards > 1 else None)

    def _loss_of(self, batch: Tensor) -> Tensor:
        ids, labels = ids_and_labels(batch)
        with torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.train_section.precision == "bfloat16"):
            return self.forward(input_ids=ids, labels=labels, use_cache=False).loss

    def _reducing(self, last: bool) -> contextlib.AbstractContextManager:
        """Reduce gradients inside the worker at the last micro step only."""
        wrapped = isinstance(self.forward, nn.parallel.DistributedDataParallel)
        return self.forward.no_sync() if wrapped and not last else contextlib.nullcontext()  # pyright: ignore

    def state_files(self) -> dict[str, Any]:
        """The worker's checkpoint files by name, from the rank that writes them."""
        if self.mesh.shard:
            return {}
        buffers = {name: buffer for name, buffer in self.model.named_buffers()}
        tensors = dict(self.parameters.named_views()) | {f"buffer:{name}": buffer for name, buffer in buffers.items()}
        return {
            f"parameters-{self.mesh.worker:05}.safetensors": {name: tensor.contiguous() for name, tensor in tensors.items()},
            f"optimizer-{self.mesh.worker:05}.pt": [optimizer.state_dict() for optimizer in self.optimizers],
        }

    def load_state_files(self, read: Any) -> None:
        """Restore from ``read(name)``, the contents of a checkpoint's file."""
        tensors = read(f"parameters-{self.mesh.worker:05}.safetensors")
        with torch.no_grad():
            for name, view in self.parameters.named_views():
                view.copy_(tensors[name])
            for name, buffer in self.model.named_buffers():
                buffer.copy_(tensors[f"buffer:{name}"])
        states = read(f"optimizer-{self.mesh.worker:05}.pt")
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


class ReplicatedParameters(FlatParameters):
    """Parameters that every rank of a worker holds whole: each merges its own share, then they share the shares.

    So the traffic between workers is that of one replica, whatever the number of ranks in it.
    """

    def __init__(self, model: nn.Module, mesh: Mesh):
        super().__init__(model)
        self.mesh = mesh
        numel = self.whole.numel()
        bounds = [numel * shard // mesh.shards for shard in range(mesh.shards + 1)]
        self.shares = [self.whole[start:stop] for start, stop in itertools.pairwise(bounds)]
        self.vector, self.start = self.shares[mesh.shard], bounds[mesh.shard]

    def push(self) -> None:
        first = self.mesh.worker * self.mesh.shards
        for shard, share in enumerate(self.shares):
            dist.broadcast(share, first + shard, group=self.mesh.inside)
        super().push()

    def sum_over_shards(self, scalars: Tensor) -> None:
        dist.all_reduce(scalars, group=self.mesh.inside)


def build_optimizers(model: nn.Module, section: Optimizer) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon for the hidden matrices and AdamW for the rest. Only tensors of 2 or more dimensions decay."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for _, p in trainable if p.ndim >= 2]
    vectors = [p for _, p in trainable if p.ndim < 2]
    optimizers: list[torch.optim.Optimizer] = []
    if section.name == "muon":
        outside = {id(p) for p in tables(model)}
        hidden = [p for p in matrices if p.ndim == 2 and id(p) not in outside]
        matrices = [p for p in matrices if p.ndim != 2 or id(p) in outside]
        # The update's size is matched to AdamW's, so that one learning rate serves both.
        optimizers.append(
            torch.optim.Muon(hidden, lr=section.lr, weight_decay=section.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    groups = [{"params": matrices, "weight_decay": section.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=section.lr, betas=section.betas, fused=True)
    return [*optimizers, adamw]


def tables(model: nn.Module) -> Iterator[nn.Parameter]:
    """The embeddings and the head, which are no hidden matrices."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # pyright: ignore
        if module is not None:
            yield module.weight
