"""How alike task vectors are, in sums over blocks from which cosines, norms and sign conflicts follow.

Correlation is measured on task vectors, never on weights: a shared base makes any two models look alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distmerge.rules.protocol import Measured, Tally
from distmerge.rules.torch_typed import to_list


def measure(delta: Tensor) -> Measured:
    """The sums of a block of task vectors ``[M, n]``, float32."""
    exact = delta.double()
    size = delta.abs()
    whole = size.sum(0)
    excess = whole - delta.sum(0).abs_()
    conflict = (delta.amax(0) > 0) & (delta.amin(0) < 0)
    live = whole > 0
    return Measured(
        added={"conflicts": conflict.sum(), "live": live.sum(), "count": torch.tensor(delta.shape[1])},
        kept={"gram": exact @ exact.T, "mass": torch.stack([excess.sum(), whole.sum()]), "l1": size.sum(1)},
    )


def settle(tally: Tally) -> dict[str, Any]:
    """The sums of a whole tensor, as JSON. The sums of several tensors may be added up."""
    return {name: to_list(value) for name, value in tally.added.items()} | {
        name: to_list(tally.total(name)) for name in ("gram", "mass", "l1")
    }


def overlap(one: Tensor, two: Tensor) -> float:
    """How much of one subspace lies in the other, 0 to 1, for orthonormal ``[n, r]``: ``|one^T two|_F^2 / r``."""
    return float((one.T @ two).square().sum() / one.shape[1])
