"""DeepSpeed inside a worker: ZeRO 0 to 3 (https://arxiv.org/abs/1910.02054) over the worker's ranks, merges between workers.

DeepSpeed's data-parallel group is the worker, not the world. The trainer decides on the optimizer, the schedule, clipping and
precision; the user decides on the rest of DeepSpeed's configuration. Only :mod:`distmerge.engine` imports deepspeed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from pydantic import ValidationError
from torch import Tensor, nn

from distmerge.config.engine import values_from_train
from distmerge.config.train import TrainConfig
from distmerge.engine.engine import Engine, StepResult, gather_whole, remaining_state
from distmerge.engine.master_weights import FlatMasterWeights, PublicMasterWeights, ShardedMasterWeights, master_parameters
from distmerge.engine.ops import build_ops, import_deepspeed
from distmerge.engine.optimizers import parameter_groups
from distmerge.errors import UserError
from distmerge.mesh import Mesh, single_rank_group


class ZeroEngine(Engine):
    """Computes inner steps with a DeepSpeedEngine; merges read and write its float32 master weights."""

    def __init__(self, model: nn.Module, config: TrainConfig, mesh: Mesh):
        super().__init__(config, mesh)
        deepspeed = import_deepspeed(mesh.device.type)
        start = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        model = model.to(mesh.device)
        self.offloads = config.engine.offloads
        if self.offloads:
            mesh.lead_first("DeepSpeed's extension", build_ops)
        optimizer, ranks = self._optimizer(model, config), WorkerRanks(mesh.inside)
        with mesh.raise_on_all_ranks():
            table = deepspeed_table(config, mesh)
            try:
                self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=table, mpu=ranks)
            except ValidationError as error:  # raised by DeepSpeed for its own configuration
                found = error.errors()[0]
                key = ".".join(map(str, found["loc"]))
                raise UserError(
                    f"config.engine.config: DeepSpeed rejects {key}: {found['msg']}, got {found['input']!r}"
                ) from None
        self.model = self.engine
        self.optimizers = [self.engine.basic_optimizer]
        self.parameters = master_parameters(self.engine)
        if isinstance(self.parameters, PublicMasterWeights):
            self.notes.append(f"DeepSpeed {deepspeed.__version__} is not verified: merges copy one parameter at a time, slowly")
        self._set_master_weights(start)

    def _optimizer(self, model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
        section = config.optimizer
        groups = parameter_groups(model, section.weight_decay)
        if self.offloads:
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, lr=section.lr, betas=section.betas, adamw_mode=True)
        return torch.optim.AdamW(groups, lr=section.lr, betas=section.betas, fused=True)

    @torch.no_grad()
    def _set_master_weights(self, start: dict[str, Tensor]) -> None:
        """Set the master weights to the model's original float32 values: DeepSpeed made them from values that it had already
        rounded to the dtype in which it computes.

        Args:
            start: the trainable parameters by name, as they were before DeepSpeed took the model.
        """
        for part in self.parameters.parts():
            values = start[part.name].view(-1)[part.first : part.first + part.numel]
            self.parameters.vector[part.offset : part.offset + part.numel].copy_(values)
        self.parameters.push()

    def train_step(self, batch: Tensor, lr: float) -> StepResult:
        self.engine.train()
        self._begin_step(lr)
        batch = batch.to(self.mesh.device, non_blocking=True)
        loss = torch.zeros((), device=self.mesh.device)
        grad_norm: Any = None
        for index, micro_batch in enumerate(batch):
            micro_loss = self.engine(input_ids=micro_batch, labels=micro_batch, use_cache=False).loss
            self.engine.backward(micro_loss)
            if index == len(batch) - 1 and isinstance(self.engine.optimizer, torch.optim.Optimizer):
                grad_norm = nn.utils.get_total_norm(p.grad for p in self.engine.module.parameters() if p.grad is not None)
            self.engine.step()
            loss += micro_loss.detach().float() / len(batch)
        if grad_norm is None:
            grad_norm = self.engine.get_global_grad_norm()
        grad_norm = torch.as_tensor(grad_norm, dtype=torch.float32, device=self.mesh.device)
        return self.worker_result(loss, grad_norm, self.tokens_of(batch))

    def _begin_step(self, lr: float) -> None:
        optimizer: Any = self.engine.basic_optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        if self.offloads:
            # DeepSpeedCPUAdam keeps running products of the betas, for the bias correction, that are not in its state_dict.
            # A new optimizer computes them from the number of the step instead, which rounds differently. Creating it anew
            # at every step makes a resumed run equal to an uninterrupted one, bit for bit.
            group = optimizer.param_groups[0]
            settings = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], optimizer.adam_w_mode, False)
            optimizer.ds_opt_adam.create_adam(optimizer.opt_id, *settings)

    @property
    def replicated(self) -> bool:
        return not isinstance(self.parameters, FlatMasterWeights)

    def _owned(self) -> list[Tensor]:
        """The tensors that the optimizer updates, in an order that is the same in every run with this layout."""
        if isinstance(self.parameters, ShardedMasterWeights):
            return self.parameters.partitions()
        return [p for group in self.engine.basic_optimizer.param_groups for p in group["params"]]

    def optimizer_state(self) -> list[dict[str, Any]]:
        return [dict(self.engine.basic_optimizer.state.get(tensor, {})) for tensor in self._owned()]

    def load_optimizer_state(self, state: list[dict[str, Any]]) -> None:
        device = self.parameters.vector.device
        for tensor, stored in zip(self._owned(), state, strict=True):
            moments = {
                key: value.to(device) if isinstance(value, Tensor) and value.ndim else value for key, value in stored.items()
            }
            self.engine.basic_optimizer.state[tensor] = moments

    def whole_state(self) -> dict[str, Tensor] | None:
        if not self.replicated:
            return gather_whole(self.engine.module, self.parameters, self.mesh)
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):
            return None  # the model's own parameters are float32
        self.parameters.pull()
        whole = {name: view.cpu() for name, view in self.parameters.named_views()}
        return whole | remaining_state(self.engine.module, whole)

    def close(self) -> None:
        from deepspeed.utils import groups

        self.engine.destroy()
        groups.mpu = None


class WorkerRanks:
    """The ``mpu`` argument of ``deepspeed.initialize``. It tells DeepSpeed that its data-parallel ranks are the worker's, and
    that there is no other parallelism.

    All ranks of the world must create it together, since it creates process groups.

    Args:
        inside: process group of the worker's ranks.
    """

    def __init__(self, inside: dist.ProcessGroup):
        import_deepspeed(inside_device(inside))
        self.inside, self.own_group = inside, single_rank_group()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.inside

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.inside)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.inside)

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.own_group

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    get_tensor_model_parallel_group = get_pipeline_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_pipeline_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_pipeline_model_parallel_world_size = get_model_parallel_world_size


def inside_device(group: dist.ProcessGroup) -> str:
    """The type of device on which a group's ranks compute, judged by the group's backend."""
    return "cuda" if "nccl" in dist.get_backend(group) else "cpu"


def deepspeed_table(config: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """The user's DeepSpeed configuration, completed with the values of [train].

    Raises:
        UserError: if it gives a ``train_batch_size`` that differs from the worker's batch size.
    """
    table = dict(config.engine.config)
    worker_batch_size = config.train.batch_size * config.train.gradient_accumulation * mesh.shards
    if table.pop("train_batch_size", "auto") not in ("auto", worker_batch_size):
        raise UserError(
            f"config.engine.config.train_batch_size must be {worker_batch_size}, which is train.batch_size x "
            f"gradient_accumulation x {mesh.shards} ranks per worker, got {config.engine.config['train_batch_size']}"
        )
    table |= {key: value for key, _, value in values_from_train(config)}
    bfloat16 = config.train.precision == "bfloat16"
    table["bf16"] = table.get("bf16", {}) | {"enabled": bfloat16}
    if bfloat16 and config.engine.stage == 0:  # the only gradient dtype that DeepSpeed supports in bfloat16 without ZeRO
        table.setdefault("data_types", {"grad_accum_dtype": "bf16"})
    table["zero_optimization"] = table.get("zero_optimization", {}) | {"stage": config.engine.stage}
    return {"steps_per_print": None, "zero_allow_untested_optimizer": True} | table
