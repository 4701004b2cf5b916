"""Checks for NaN and infinity: of a worker's own values before they are sent, and of a mean before it is applied."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distmerge.errors import UserError
from distmerge.finite import nonfinite
from distmerge.theta.flat import FlatParameters
from distmerge.workers.fragments import Bucket
from distmerge.workers.pending import PendingReduce


def is_finite(flat: FlatParameters, buckets: Iterable[Bucket]) -> bool:
    """Whether this worker's parameters in the buckets are finite on all of its ranks; a collective inside the worker."""
    parts = [part for bucket in buckets for part in bucket.slices]
    found = [nonfinite(flat.vector[part]) for part in parts if part.stop > part.start]
    nonfinite_values = torch.stack(found).sum() if found else torch.zeros((), device=flat.vector.device)
    flat.sum_over_shards(nonfinite_values)
    return nonfinite_values.item() == 0


def check_mean(pending: PendingReduce, nonfinite: str, step: int) -> None:
    """Refuse a finished mean that is not finite. All workers hold the same bits, so all of them refuse it."""
    if pending.is_finite():
        return
    cause = (
        'or set nonfinite = "leave-out", which merges the others'
        if nonfinite == "raise"
        else "each worker was finite by itself, so their sum or the wire's format overflowed"
    )
    raise UserError(
        f"the merge at step {step} would take in values that are not finite (NaN or infinity), so a worker has diverged: "
        f"lower the learning rate, {cause}"
    )
