"""What becomes of the inner optimizer's moments when a run goes back: kept, reset, averaged or rolled back.

Nothing is published on which is best, so that it is a setting, and ``rollback`` the control arm.
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
    """A copy of the live moments."""
    return copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])


def put(optimizers: list[torch.optim.Optimizer], states: States) -> None:
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)


def reset(optimizers: list[torch.optim.Optimizer]) -> None:
    """As if no step had been taken."""
    for optimizer in optimizers:
        optimizer.state.clear()


def all_finite(states: States) -> bool:
    """Whether every moment is a number."""
    tensors = [tensor for state in states for moments in state["state"].values() for tensor in moments.values()]
    return all(finite(tensor) for tensor in tensors if isinstance(tensor, Tensor))


def average(members: list[States]) -> States:
    """The mean of the members' moments, newest first; counts of steps are the newest's."""
    merged = copy.deepcopy(members[0])
    for index, state in enumerate(merged):
        for key, moments in state["state"].items():
            for name, tensor in moments.items():
                if name != "step" and isinstance(tensor, Tensor):
                    others = [member[index]["state"][key][name] for member in members]
                    tensor.copy_(torch.stack([other.float() for other in others]).mean(0))
    return merged
