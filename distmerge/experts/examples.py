"""Example by example: how hard each is, when it was learned, how often it was forgotten.

An example is a row of the training data; for a classifier it is one input with one label. Difficulty is EL2N, the norm of the
error ``|softmax(logits) - onehot|_2`` early in training, averaged over an example's tokens (https://arxiv.org/abs/2107.07075).
A forgetting event is a look at which an example is no longer learned that was at the look before
(https://arxiv.org/abs/1812.05159). A look is a forward pass over all tracked examples, where the run publishes a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from distmerge.config.experts import Examples
from distmerge.data.loss_mask import IGNORED, ids_and_labels


class Scores(NamedTuple):
    """Of each example ``[N]``, float64: its mean loss and EL2N over its targets, how many it has, how many are right."""

    loss: Tensor
    el2n: Tensor
    targets: Tensor
    right: Tensor


class Known(NamedTuple):
    """What is known of each tracked example ``[N]``: 19 bytes.

    Attributes:
        difficulty: float32, EL2N at the early look; NaN before it.
        loss, before: float32, at the last look and at the one before.
        first_learned: int32, the step at which it was first seen to be learned; 0 for never.
        forgotten: int16, forgetting events.
        learned: bool, at the last look.
    """

    difficulty: Tensor
    loss: Tensor
    before: Tensor
    first_learned: Tensor
    forgotten: Tensor
    learned: Tensor


def nothing_known(count: int) -> Known:
    unknown = torch.full((count,), float("nan"))
    zeros = torch.zeros(count, dtype=torch.int32)
    return Known(unknown, unknown.clone(), unknown.clone(), zeros, zeros.to(torch.int16), zeros.bool())


def tracked_rows(total: int, count: int, seed: int) -> np.ndarray:
    """The rows that a run tracks: drawn by its seed, ascending."""
    order = np.random.Generator(np.random.Philox(key=[seed, 1 << 62])).permutation(total)
    return np.sort(order[:count])


def observe(known: Known, scores: Scores, step: int, section: Examples) -> Known:
    """What is known after a look at ``step``."""
    learned = scores.right >= section.learned * scores.targets
    first = torch.where((known.first_learned == 0) & learned, step, known.first_learned).to(torch.int32)
    early = known.difficulty.isnan() & (step >= section.early)
    return Known(
        difficulty=torch.where(early, scores.el2n.float(), known.difficulty),
        loss=scores.loss.float(),
        before=known.loss,
        first_learned=first,
        forgotten=known.forgotten + (known.learned & ~learned).to(torch.int16),
        learned=learned,
    )


def token_scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, EL2N and whether it is right, of each target: ``logits [..., C]`` and ``labels [...]`` to ``[...]`` each; 0 and
    False where the label is ``IGNORED``."""
    counted = labels != IGNORED
    chosen = labels.clamp(min=0).unsqueeze(-1)
    log_p = logits.float().log_softmax(-1)
    own = log_p.gather(-1, chosen).squeeze(-1)
    error = (log_p.exp().square().sum(-1) - 2 * own.exp() + 1).clamp(min=0).sqrt()
    right = (logits.argmax(-1) == labels) & counted
    return -own * counted, error * counted, right


def scores_of(loss: Tensor, error: Tensor, right: Tensor, counted: Tensor) -> Scores:
    """``[N, T]`` of each target to one number an example."""
    targets = counted.sum(1).double()
    share = targets.clamp(min=1)
    return Scores(loss.double().sum(1) / share, error.double().sum(1) / share, targets, right.sum(1).double())


@torch.no_grad()
def predictions(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[N, T, V]`` of a causal language model, and labels ``[N, T]``, of the tokens after each row's first."""
    ids, labels = ids_and_labels(batch)
    return model(input_ids=ids, use_cache=False).logits[:, :-1], labels[:, 1:]


def look(model: nn.Module, data: datasets.Dataset, rows: np.ndarray, batch_size: int, rank: int = 0, world: int = 1) -> Scores:
    """The scores of some rows, in their order. With several ranks a collective: each looks at its share.

    The model's mode is left as it was.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    found = torch.zeros(4, len(rows), dtype=torch.float64, device=device)
    for index in range(rank, -(-len(rows) // batch_size), world):
        part = slice(index * batch_size, (index + 1) * batch_size)
        batch = rows_of(data, rows[part]).to(device)
        logits, labels = predictions(model, batch)
        found[:, part] = torch.stack(scores_of(*token_scores(logits, labels), labels != IGNORED))
    if world > 1:
        dist.all_reduce(found)
    model.train(was_training)
    return Scores(*found.cpu())


def rows_of(data: datasets.Dataset, rows: np.ndarray) -> Tensor:
    """``[N, length]`` int64, of some rows."""
    taken: Any = data[rows]
    return torch.from_numpy(np.asarray(taken["input_ids"], dtype=np.int64))
