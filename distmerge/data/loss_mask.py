"""Which tokens count in the loss. A token that does not count is stored as its bitwise complement, ``~id``, a negative number.

So one integer per token holds both its id and the mask: batches need no second tensor, and plain text is stored as before. For
example, ``[~5, ~9, 7, 2]`` are the tokens 5, 9, 7, 2, of which only 7 and 2 are to be predicted.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
"""transformers' label for a token that does not count in the loss."""


def ids_and_labels(batch: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids, and labels that are ``IGNORED`` where the token is a complement; both of the batch's shape."""
    masked = batch < 0
    return torch.where(masked, ~batch, batch), torch.where(masked, IGNORED, batch)


def predicted(batch: Tensor) -> Tensor:
    """How many tokens of ``[..., length]`` the loss is taken over, int64: all that count, except the first of each sequence."""
    return (batch[..., 1:] >= 0).sum()


def micro_weights(batch: Tensor, inside: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Factors for the micro steps' mean losses, with which their mean, also over a worker's ranks, is the mean over all tokens
    that count.

    For example, two micro steps with 1 and 3 such tokens get the factors 0.5 and 1.5.

    Args:
        batch: ``[micro_steps, batch, length]``.
        inside: the group of the worker's ranks, if it has several; then this is a collective.

    Returns:
        the factors ``[micro_steps]``, and the number of all tokens that count, a float64 scalar on the batch's device.
    """
    counts = (batch[..., 1:] >= 0).sum((1, 2)).double()
    total = torch.stack([counts.sum(), torch.tensor(float(len(counts)), dtype=torch.float64, device=batch.device)])
    if inside is not None:
        dist.all_reduce(total, group=inside)
    return (counts * total[1] / total[0].clamp(min=1)).float(), total[0]
