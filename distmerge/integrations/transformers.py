"""Merging in the ``Trainer`` of transformers (https://huggingface.co/docs/transformers/main_classes/trainer).

    dist.init_process_group("gloo")
    rank, workers = one_worker_per_rank()
    trainer = Trainer(model, TrainingArguments(f"runs/worker-{rank}"), train_dataset=data.shard(workers, rank),
                      callbacks=[MergeCallback(lambda model: dm.DiLoCo(model, every=50))])
    trainer.train()

Each rank is a worker with its own Trainer. Without :func:`one_worker_per_rank` the Trainer would reduce gradients over all
ranks at every step. The callback counts the tokens of each step in the forward passes of its micro steps and passes the number
to the merger, which may weight workers by it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from distmerge.data.loss_mask import IGNORED
from distmerge.errors import UserError
from distmerge.files.directories import replace_file
from distmerge.workers.compose import Composed
from distmerge.workers.divergence import MergeReport
from distmerge.workers.merger import Merger

STATE = "merger-{rank:05}.pt"
"""The file with the merger's state in the Trainer's checkpoints."""


def one_worker_per_rank() -> tuple[int, int]:
    """Make a Trainer that is created afterwards train on this rank only.

    A Trainer finds the ranks through environment variables, which this function removes.

    Returns:
        this rank and the number of ranks.

    Raises:
        UserError: before ``init_process_group``, which needs the environment variables.
    """
    if not dist.is_initialized():
        raise UserError(
            "call torch.distributed.init_process_group() before one_worker_per_rank(), which removes its environment variables"
        )
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return dist.get_rank(), dist.get_world_size()


class TokenCount:
    """Counts the tokens that count in a model's loss during training: the labels of each forward pass that are not ignored.

    A causal language model predicts all labels of a sequence except the first. If the Trainer does not pass the labels to the
    model, as with label smoothing, the tokens of the attention mask are counted, or without a mask all tokens.

    Args:
        model: the model whose forward passes are observed.
    """

    def __init__(self, model: nn.Module):
        self.tokens: float | Tensor = 0.0
        # transformers decides in the same way whether the loss shifts the labels.
        causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
        self.shifts = causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def take(self) -> float | Tensor:
        """The number of tokens since the last call. It may be a scalar on the device, since reading it would synchronize."""
        tokens, self.tokens = self.tokens, 0.0
        return tokens

    def _see(self, model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if model.training:
            self.tokens = self.tokens + self._counted(keywords)

    def _counted(self, keywords: dict[str, Any]) -> float | Tensor:
        shifted, labels = keywords.get("shift_labels"), keywords.get("labels")
        if shifted is not None:
            return (shifted != IGNORED).sum().double()
        if labels is not None:
            return ((labels[..., 1:] if self.shifts else labels) != IGNORED).sum().double()
        mask, ids = keywords.get("attention_mask"), keywords.get("input_ids")
        if mask is not None:
            return mask.sum().double()
        return float(ids.numel()) if ids is not None else 1.0


class MergeCallback(TrainerCallback):
    """Merges the model that a Trainer trains with the models of the other ranks.

    The merger's state is saved in the Trainer's checkpoints, so ``resume_from_checkpoint`` can continue between two merges.

    Args:
        make: creates the merger, or a composition of several, for the model that the Trainer has prepared.

    Attributes:
        reports: reports of all merges so far.
    """

    def __init__(self, make: Callable[[nn.Module], Merger | Composed]):
        self.make = make
        self.made: tuple[Merger | Composed, TokenCount] | None = None
        self.reports: list[MergeReport] = []

    @property
    def merger(self) -> Merger | Composed:
        """The merger that ``make`` returned; available once training has begun."""
        assert self.made is not None, "the merger is made when training begins"
        return self.made[0]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        own = [p.detach().clone() for p in model.parameters()]
        self.made = self.make(model), TokenCount(model)
        if state.global_step == 0:
            return
        with torch.no_grad():  # making a merger copies the first worker's weights to all, but this worker resumes with its own
            for parameter, values in zip(model.parameters(), own, strict=True):
                parameter.copy_(values)
        self.merger.load_state_dict(torch.load(self._path(args, state), weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.made is not None, "the merger is made when training begins"
        report = self.merger.step(self.made[1].take())
        self.reports += report if isinstance(report, list) else [report] if report is not None else []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        replace_file(self._path(args, state), self.merger.state_dict())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.made is not None, "the merger is made when training begins"
        self.merger.finish()
        self.made[1].hook.remove()

    def _path(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE.format(rank=dist.get_rank())
