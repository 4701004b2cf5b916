"""Tracks training examples one by one: how difficult each is, when it was learned, and how often it was forgotten.

An example is a row of the training data; for a classifier it is one input with one label. The tracked examples are scored by a
forward pass whenever the run publishes a step. Difficulty is EL2N, the norm ``|softmax(logits) - onehot|_2`` of the error early
in training, averaged over the example's tokens (https://arxiv.org/abs/2107.07075). A forgetting event is a pass in which an
example is not learned that was learned in the pass before (https://arxiv.org/abs/1812.05159).
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
    """Scores of examples in one pass, ``[N]`` float64 each.

    Attributes:
        loss, el2n: means over the example's targets.
        targets: the number of its targets, the tokens to predict.
        right: how many of them were predicted correctly.
    """

    loss: Tensor
    el2n: Tensor
    targets: Tensor
    right: Tensor


class Known(NamedTuple):
    """What is known of each tracked example, ``[N]`` each: 19 bytes per example.

    Attributes:
        difficulty: float32, EL2N in the first pass from ``examples.early`` on; NaN before it.
        loss, before: float32, the losses in the last pass and in the one before it.
        first_learned: int32, the step of the first pass in which it was learned; 0 if it never was.
        forgotten: int16, the number of forgetting events.
        learned: bool, whether it was learned in the last pass.
    """

    difficulty: Tensor
    loss: Tensor
    before: Tensor
    first_learned: Tensor
    forgotten: Tensor
    learned: Tensor


def nothing_known(count: int) -> Known:
    """The state of ``count`` examples before the first pass."""
    unknown = torch.full((count,), float("nan"))
    zeros = torch.zeros(count, dtype=torch.int32)
    return Known(unknown, unknown.clone(), unknown.clone(), zeros, zeros.to(torch.int16), zeros.bool())


def tracked_rows(total: int, count: int, seed: int) -> np.ndarray:
    """The rows that a run tracks, ascending: at most ``count`` of ``total``, drawn with the run's seed."""
    order = np.random.Generator(np.random.Philox(key=[seed, 1 << 62])).permutation(total)
    return np.sort(order[:count])


def observe(known: Known, scores: Scores, step: int, section: Examples) -> Known:
    """What is known after a pass at ``step`` that gave these scores."""
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
    """The loss, the EL2N and whether the prediction is right, for each target, ``[...]`` each.

    Args:
        logits: ``[..., C]``.
        labels: ``[...]``; where one is ``IGNORED``, the results are 0 and False.
    """
    counted = labels != IGNORED
    chosen = labels.clamp(min=0).unsqueeze(-1)
    log_p = logits.float().log_softmax(-1)
    own = log_p.gather(-1, chosen).squeeze(-1)
    # |p - onehot|^2 = sum p_i^2 - 2 p_label + 1; rounding could make it slightly negative.
    error = (log_p.exp().square().sum(-1) - 2 * own.exp() + 1).clamp(min=0).sqrt()
    right = (logits.argmax(-1) == labels) & counted
    return -own * counted, error * counted, right


def scores_of(loss: Tensor, error: Tensor, right: Tensor, counted: Tensor) -> Scores:
    """The scores of examples ``[N]`` from those of their targets, ``[N, T]`` each; ``counted`` says which are targets."""
    targets = counted.sum(1).double()
    share = targets.clamp(min=1)
    return Scores(loss.double().sum(1) / share, error.double().sum(1) / share, targets, right.sum(1).double())


@torch.no_grad()
def predictions(model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
    """A causal language model's logits ``[N, T, V]`` for the tokens after each row's first, and their labels ``[N, T]``."""
    ids, labels = ids_and_labels(batch)
    return model(input_ids=ids, use_cache=False).logits[:, :-1], labels[:, 1:]


def score_rows(
    model: nn.Module, data: datasets.Dataset, rows: np.ndarray, batch_size: int, rank: int = 0, world: int = 1
) -> Scores:
    """The scores of some rows, in their order. The model stays in training or evaluation mode, as it was.

    With several ranks it is a collective, in which each rank scores its share of the rows.
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
    """The token ids of some rows, ``[N, length]`` int64."""
    taken: Any = data[rows]
    return torch.from_numpy(np.asarray(taken["input_ids"], dtype=np.int64))
