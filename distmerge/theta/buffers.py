"""How a merge treats a model's buffers: each needs a policy, and a buffer without one is refused by name."""

from __future__ import annotations

from typing import Literal, get_args

from torch import nn

from distmerge.errors import UserError

Policy = Literal["mean", "last", "equal"]
"""mean: averaged like a parameter. last: taken from the first (or newest) member. equal: must be the same in all members."""

POLICIES: dict[str, Policy] = {
    "running_mean": "mean",
    "running_var": "mean",
    "num_batches_tracked": "last",
    "inv_freq": "equal",
    "original_inv_freq": "equal",
    "position_ids": "equal",
    "token_type_ids": "equal",
    "bias": "equal",  # GPT-2's causal mask
    "masked_bias": "equal",
}
"""Policies for the buffers of torch's and transformers' modules, by the last part of the buffer's name."""


def buffer_policies(model: nn.Module, given: dict[str, Policy] | None = None) -> dict[str, Policy]:
    """The policy of each of the model's buffers, by full name.

    An unknown buffer that is not in the model's state_dict is a constant that the model computes, so its policy is "equal".

    Args:
        given: policies by full name or by its last part, which take precedence over the known ones.

    Raises:
        UserError: for a buffer without a policy, for an unknown policy, and for "mean" of a buffer that is not floating point.
    """
    for name, policy in (given or {}).items():
        if policy not in get_args(Policy):
            raise UserError(f"buffers[{name!r}] must be one of mean, last, equal, got {policy!r}")
    table = POLICIES | (given or {})
    policies: dict[str, Policy] = {}
    for name, buffer in model.named_buffers():
        policy = table.get(name) or table.get(name.rpartition(".")[2])
        if policy is None and name not in model.state_dict():
            policy = "equal"
        if policy is None:
            raise UserError(f"buffer {name} has no merge policy; pass buffers={{{name!r}: 'mean' | 'last' | 'equal'}}")
        if policy == "mean" and not buffer.is_floating_point():
            raise UserError(f"buffer {name} is {buffer.dtype}, so its policy must be last or equal, got mean")
        policies[name] = policy
    return policies
