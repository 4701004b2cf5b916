"""Which tokens the loss is taken of. A token that it is not taken of is stored as its complement, ``~id``, a negative number.

So one integer a token says both, batches keep their shape on every way that they take, and plain text is what it always was.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
"""transformers' label of a token that no loss is taken of."""


def ids_and_labels(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids, and labels that are ``IGNORED`` where the token is a complement; of the batch's shape."""
    masked = batch < 0
    return torch.where(masked, ~batch, batch), torch.where(masked, IGNORED, batch)


def predicted(batch: Tensor) -> Tensor:
    """The tokens of ``[..., length]`` that the loss is taken of, int64: all that count, but for the first of each sequence."""
    return (batch[..., 1:] >= 0).sum()


def micro_weights(batch: Tensor, inside: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """What makes the mean of the micro steps' mean losses, over a worker's ranks too, the mean over all tokens that count.

    Returns:
        the micro steps' factors ``[micro_steps]``, and how many tokens count in all, a float64 scalar on the batch's device.

    Args:
        batch: ``[micro_steps, batch, length]``.
        inside: the worker's ranks, where it has several; then this is a collective.
    """
    counts = (batch[..., 1:] >= 0).sum((1, 2)).double()
    total = torch.stack([counts.sum(), torch.tensor(float(len(counts)), dtype=torch.float64, device=batch.device)])
    if inside is not None:
        dist.all_reduce(total, group=inside)
    return (counts * total[1] / total[0].clamp(min=1)).float(), total[0]
