"""The plain torch engine: a whole replica on each rank, with DistributedDataParallel if a worker has several ranks."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from distmerge.config.train import TrainConfig
from distmerge.data.loss_mask import ids_and_labels, micro_weights
from distmerge.engine.engine import Engine, StepResult
from distmerge.engine.optimizers import build_optimizers
from distmerge.engine.parameters import ReplicatedParameters
from distmerge.mesh import Mesh
from distmerge.theta.flat import FlatParameters


class TorchEngine(Engine):
    """Computes inner steps on a model whose float32 parameters are views of the flat vector."""

    def __init__(self, model: nn.Module, config: TrainConfig, mesh: Mesh):
        super().__init__(config, mesh)
        self.uneven = config.data.format != "text"
        self.model = model.to(mesh.device)
        self.forward = self._distribute()
        self.optimizers = build_optimizers(self.model, config.optimizer)
        self._loss = torch.compile(self._loss_of) if config.train.compile else self._loss_of
        self._trainable = [p for p in self.model.parameters() if p.requires_grad]

    def _distribute(self) -> nn.Module:
        """Set ``parameters`` and return the module whose forward pass computes the loss."""
        if self.mesh.shards == 1:
            self.parameters = FlatParameters(self.model)
            return self.model
        self.parameters = ReplicatedParameters(self.model, self.mesh.inside)
        devices = [self.mesh.device] if self.mesh.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.model, device_ids=devices, process_group=self.mesh.inside)

    def train_step(self, batch: Tensor, lr: float) -> StepResult:
        self.model.train()
        batch = batch.to(self.mesh.device, non_blocking=True)
        loss = torch.zeros((), device=self.mesh.device)
        weights, tokens = self._weights(batch)
        for index, micro_batch in enumerate(batch):
            with self._reducing(index == len(batch) - 1):
                micro_loss = self._loss(micro_batch) / len(batch)
                micro_loss = micro_loss if weights is None else micro_loss * weights[index]
                micro_loss.backward()
            loss += micro_loss.detach()
        grad_norm = self._clip(self.train_section.gradient_clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return self.worker_result(loss, grad_norm, tokens)

    def _weights(self, batch: Tensor) -> tuple[Tensor | None, Tensor | float]:
        """The factor of each micro step's loss, ``[micro_steps]``, and the number of tokens of the whole worker.

        Where examples have different numbers of tokens, the factors turn the mean over micro steps and ranks into the mean over
        tokens. They are None where every micro step has as many tokens as the others.
        """
        if not self.uneven:
            return None, self.tokens_of(batch)
        return micro_weights(batch, self.mesh.inside if self.mesh.shards > 1 else None)

    def _loss_of(self, batch: Tensor) -> Tensor:
        ids, labels = ids_and_labels(batch)
        with torch.autocast(self.mesh.device.type, torch.bfloat16, enabled=self.train_section.precision == "bfloat16"):
            return self.forward(input_ids=ids, labels=labels, use_cache=False).loss

    def _reducing(self, last: bool) -> contextlib.AbstractContextManager:
        """A context in which gradients are reduced inside the worker only if this is the last micro step."""
        wrapped = isinstance(self.forward, nn.parallel.DistributedDataParallel)
        return self.forward.no_sync() if wrapped and not last else contextlib.nullcontext()  # pyright: ignore

    def _clip(self, limit: float) -> Tensor:
        """Clip the gradient to the norm ``limit``, unless that is 0, and return its norm before clipping."""
        grad_norm = nn.utils.get_total_norm(p.grad for p in self._trainable if p.grad is not None)
        if limit:
            nn.utils.clip_grads_with_norm_(self._trainable, limit, grad_norm)
        return grad_norm

    def optimizer_state(self) -> list[dict[str, Any]]:
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_optimizer_state(self, state: list[dict[str, Any]]) -> None:
        for optimizer, stored in zip(self.optimizers, state, strict=True):
            optimizer.load_state_dict(stored)
