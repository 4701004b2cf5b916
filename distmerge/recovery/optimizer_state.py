"""The inner optimizer's moments after a roll-back: they are kept, reset, averaged or rolled back.

No published result says which is best, so it is a setting; ``rollback`` serves as the baseline.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from distmerge.finite import finite

States = list[dict[str, Any]]
"""The state_dicts of a worker's inner optimizers."""


def take(optimizers: list[torch.optim.Optimizer]) -> States:
    """A copy of the optimizers' current states."""
    return copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])


def put(optimizers: list[torch.optim.Optimizer], states: States) -> None:
    """Load states into the optimizers."""
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)


def reset(optimizers: list[torch.optim.Optimizer]) -> None:
    """Clear the optimizers' states, as if no step had been taken."""
    for optimizer in optimizers:
        optimizer.state.clear()


def all_finite(states: States) -> bool:
    """Whether all elements of all moments are finite."""
    tensors = [tensor for state in states for moments in state["state"].values() for tensor in moments.values()]
    return all(finite(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def average(members: list[States]) -> States:
    """The mean of the members' moments. Members are given newest first, and the newest one's step counts are kept."""
    merged = copy.deepcopy(members[0])
    for index, state in enumerate(merged):
        for key, moments in state["state"].items():
            for name, tensor in moments.items():
                if name != "step" and isinstance(tensor, Tensor):
                    others = [member[index]["state"][key][name] for member in members]
                    tensor.copy_(torch.stack([other.float() for other in others]).mean(0))
    return merged
