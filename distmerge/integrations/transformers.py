"""Merging in the ``Trainer`` of transformers (https://huggingface.co/docs/transformers/main_classes/trainer).

    dist.init_process_group("gloo")
    rank, workers = one_worker_per_rank()
    trainer = Trainer(model, TrainingArguments(f"runs/worker-{rank}"), train_dataset=data.shard(workers, rank),
                      callbacks=[MergeCallback(lambda model: dm.DiLoCo(model, every=50))])
    trainer.train()

Each rank is a worker with a Trainer of its own: the Trainer itself would reduce gradients over all ranks at each step.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from distmerge.errors import UserError
from distmerge.files.directories import replace_file

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


class MergeCallback(TrainerCallback):
    """Merges the model that a Trainer trains with those of the other ranks.

    Its state is part of the Trainer's checkpoints, so that ``resume_from_checkpoint`` goes on in mid-round.

    Args:
        make: the merger, or several of them composed, of the model that the Trainer has prepared.

    Attributes:
        merger: what ``make`` made, once training has begun.
        reports: of all merges so far.
    """

    def __init__(self, make: Callable[[nn.Module], Any]):
        self.make = make
        self.merger: Any = None
        self.reports: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        own = [p.detach().clone() for p in model.parameters()]
        self.merger = self.make(model)
        if state.global_step == 0:
            return
        with torch.no_grad():  # a new merger gave all workers the first one's weights; a resumed one has its own
            for parameter, values in zip(model.parameters(), own, strict=True):
                parameter.copy_(values)
        self.merger.load_state_dict(torch.load(self._path(args, state), weights_only=True))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        report = self.merger.step()
        self.reports += report if isinstance(report, list) else [report] if report is not None else []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        replace_file(self._path(args, state), self.merger.state_dict())

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.merger.finish()

    def _path(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE.format(rank=dist.get_rank())
