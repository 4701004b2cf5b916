"""Merging in the ``Trainer`` of transformers (https://huggingface.co/docs/transformers/main_classes/trainer).

    dist.init_process_group("gloo")
    rank, workers = one_worker_per_rank()
    trainer = Trainer(model, TrainingArguments(f"runs/worker-{rank}"), train_dataset=data.shard(workers, rank),
                      callbacks=[MergeCallback(lambda model: dm.DiLoCo(model, every=50))])
    trainer.train()

Each rank is a worker with a Trainer of its own: the Trainer itself would reduce gradients over all ranks at each step.
The merger is told how many tokens each step was trained on, counted in the forward passes of its micro steps.
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
"""The mergers' state, beside the Trainer's own in its checkpoints."""


def one_worker_per_rank() -> tuple[int, int]:
    """Let a Trainer that is made afterwards train on this rank alone; this rank and how many there are.

    The Trainer looks for its world in the environment, from which it is taken.

    Raises:
        UserError: before init_process_group, for which the environment is needed.
    """
    if not dist.is_initialized():
        raise UserError("call torch.distributed.init_process_group() before one_worker_per_rank(), which takes its environment")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        os.environ.pop(name, None)
    return dist.get_rank(), dist.get_world_size()


class TokenCount:
    """Counts the tokens that a model's loss is taken of while it trains: the labels of each forward pass that are not ignored.

    A causal language model predicts all labels of a sequence but the first. Where the Trainer keeps the labels to itself, as
    label smoothing does, what counts is the attention mask, or without one every token.

    Args:
        model: whose forward passes are seen.
    """

    def __init__(self, model: nn.Module):
        self.tokens: float | Tensor = 0.0
        # As the Trainer itself finds out whether the loss shifts the labels.
        causal = LOSS_MAPPING.get(str(getattr(model, "loss_type", None))) is ForCausalLMLoss
        self.shifts = causal and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        self.hook = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def take(self) -> float | Tensor:
        """The tokens since the last call; on the model's device, since reading them there would wait for the step."""
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
    """Merges the model that a Trainer trains with those of the other ranks.

    Its state is part of the Trainer's checkpoints, so that ``resume_from_checkpoint`` goes on in mid-round.

    Args:
        make: the merger, or several of them composed, of the model that the Trainer has prepared.

    Attributes:
        reports: of all merges so far.
    """

    def __init__(self, make: Callable[[nn.Module], Merger | Composed]):
        self.make = make
        self.made: tuple[Merger | Composed, TokenCount] | None = None
        self.reports: list[MergeReport] = []

    @property
    def merger(self) -> Merger | Composed:
        """What ``make`` made, once training has begun."""
        assert self.made is not None, "training has begun"
        return self.made[0]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        own = [p.detach().clone() for p in model.parameters()]
        self.made = self.make(model), TokenCount(model)
        if state.global_step == 0:
            return
        with torch.no_grad():  # a new merger gave all workers the first one's weights; a resumed one has its own
            for parameter, values in zip(model.parameters(), own, strict=True):
                parameter.copy_(values)
        self.merger.load_state_dict(torch.load(self._path(args, state), weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.made is not None, "training has begun"
        report = self.merger.step(self.made[1].take())
        self.reports += report if isinstance(report, list) else [report] if report is not None else []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        replace_file(self._path(args, state), self.merger.state_dict())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self.made is not None, "training has begun"
        self.merger.finish()
        self.made[1].hook.remove()

    def _path(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE.format(rank=dist.get_rank())
