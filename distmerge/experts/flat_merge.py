"""Merges in memory: models as flat vectors, the rules of :mod:`distmerge.rules` on all of theta at once.

The rules see one tensor, so a trim is global, as the TIES paper has it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distmerge.experts.build import open_source
from distmerge.experts.inspect import mean_of
from distmerge.experts.members import open_all
from distmerge.experts.pairing import take
from distmerge.files.sources import Maps
from distmerge.rules.counter import key_of
from distmerge.rules.linear import Linear
from distmerge.rules.rule import Rule, run
from distmerge.rules.sparsify import AtRandom, ByMagnitude
from distmerge.rules.task import Combine, Ptm, TaskVectors

METHODS = ("mean", "task_arithmetic", "ties", "dare", "ptm")


def merge(method: str, base: Tensor, members: list[Tensor], scale: float = 1.0, density: float = 0.2, seed: int = 0) -> Tensor:
    """``[n]``: the merge of experts ``[n]`` each, trained from ``base [n]``.

    Args:
        method: "mean" of the task vectors, "task_arithmetic" (their sum), "ties" or "dare" (the sum of what survives,
            rescaled by one over the density); all times ``scale``. "ptm": the first member is the general model, to which
            ``scale`` times the others' task vectors are added.
        density: share that ties and dare keep.
        seed: of dare's draws.
    """
    assert method in METHODS, method
    if method == "ptm":
        return run(Ptm([scale] * (len(members) - 1)), members, base)
    return run(rule_of(method, len(members), base.numel(), scale, density, seed), members, base)


def rule_of(method: str, count: int, numel: int, scale: float, density: float, seed: int) -> Rule:
    ones = [1.0] * count
    plain = Combine(scale=scale)
    if method == "ties":
        elected = Combine(elect="before", on_cancel="zero", divide="count", scale=scale)
        trim = ByMagnitude([density] * count, None, "keep", torch.float32)
        return TaskVectors(ones, elected, trim if density < 1 else None, "none", torch.float32, numel)
    if method == "dare":
        drop = AtRandom([density] * count, [key_of(seed, "theta", index) for index in range(count)])
        return TaskVectors(ones, plain, drop, "inverse", torch.float32, numel)
    weights = [1 / count] * count if method == "mean" else ones
    return TaskVectors(weights, plain, None, "none", torch.float32, numel)


def line(one: Tensor, two: Tensor, share: float) -> Tensor:
    """``(1 - share) one + share two``: linear interpolation, and WiSE-FT from a model to its finetuned self."""
    return run(Linear([1 - share, share]), [one, two])


def read_model(reference: str, base: str) -> dict[str, Tensor]:
    """A model's tensors in float32, an adapter on ``base`` added in.

    Raises:
        UserError: when there is none.
    """
    models = open_all(mean_of(base, [reference]), allow_pickle=False)
    maps, model = Maps(), models[reference]
    found = {}
    for name, stored in model.tensors.items():
        source = open_source(take(model, name), maps)
        found[name] = source.read(0, stored.numel).view(source.shape).float()
    return found
