"""Merges in memory: models are flat vectors, and the catalogue's rules run on all parameters as one tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from distmerge.files.sources import Maps
from distmerge.merging.diagnose import mean_of
from distmerge.merging.diagnosis import summarise
from distmerge.merging.jobs import open_source
from distmerge.merging.models import open_all
from distmerge.merging.pairing import input_of
from distmerge.rules import catalogue, similarity
from distmerge.rules.mean import WeightedMean
from distmerge.rules.protocol import Tally, Target, run, spans


def merge(
    method: str, base: Tensor, members: list[Tensor], scale: float | list[float] = 1.0, density: float = 0.2, seed: int = 0
) -> Tensor:
    """The merge ``[n]`` of models trained from ``base [n]``, by a rule of the catalogue in its paper's form.

    All parameters are one tensor here, so that trimming takes the largest elements of the whole model.

    Args:
        method: a name in the catalogue. For a method with a general model, such as ptm, that is the first member.
        members: models ``[n]`` each.
        scale: lambda, by which the merged task vector is multiplied; or omega, for rules that have it, also one for each
            member other than the general model.
        density: the share of each task vector that sparsifying rules keep.
        seed: of random masks.
    """
    name, entry = catalogue.canonical(method), catalogue.entry(method)
    each = [{"weight": 1.0, "density": density} for _ in members]
    if "omega" in entry.parameters:
        skills = len(members) - (entry.first == "general")
        omegas = scale if isinstance(scale, list) else [scale] * skills
        each = [{"omega": omega} for omega in [*[0.0] * (len(members) - skills), *omegas]]
        scale = 1.0
    assert not isinstance(scale, list), "only omegas can differ between members"
    if entry.linear and entry.base == "none":
        # The mean of models is the base plus the mean of their task vectors.
        name, each = "task_arithmetic", [{"weight": 1 / len(members)} for _ in members]
        entry = catalogue.entry(name)
    target = Target(
        "theta", (base.numel(),), tuple(each), {"lambda": scale}, {"compat": "paper", "trim": "tensor"}, seed=seed
    )  # fmt: skip
    rule = catalogue.build(name, target)
    if {"lambda", "omega"} & {*entry.parameters}:
        return run(rule, members, base)
    return base + run(rule, [member - base for member in members]).mul_(scale)


def line(one: Tensor, two: Tensor, share: float) -> Tensor:
    """``(1 - share) one + share two``: linear interpolation. From a model to a finetuned version of it, this is WiSE-FT
    (https://arxiv.org/abs/2109.01903)."""
    return run(WeightedMean([1 - share, share]), [one, two])


def read_model(reference: str, base: str) -> dict[str, Tensor]:
    """A model's tensors in float32, by name. An adapter is applied to ``base``.

    Raises:
        UserError: when there is no such model, or an adapter does not fit.
    """
    models = open_all(mean_of(base, [reference]), allow_pickle=False)
    maps, model = Maps(), models[reference]
    found: dict[str, Tensor] = {}
    for name, stored in model.tensors.items():
        source = open_source(input_of(model, name), maps)
        found[name] = source.read(0, stored.numel).view(source.shape).float()
    return found


def diagnose(base: Tensor, members: list[Tensor], names: list[str]) -> dict[str, Any]:
    """The statistics and the recommendation of ``distmerge diagnose``, for vectors ``[n]``."""
    tally = Tally()
    for index, (start, stop) in enumerate(spans(base.numel(), 1)):
        tally.add(index, similarity.measure(torch.stack([member[start:stop] - base[start:stop] for member in members])))
    report = summarise(
        {"theta": similarity.settle(tally) | {"rounding": [0.0, 1.0], "each": [0.0] * len(members)}}, names, "the base"
    )
    whole = report.as_dict()
    return whole["whole"] | {"recommendation": whole["recommendation"]}


CANDIDATES = {"mean": 1.0, "ties": 0.2, "dare_ties": 0.5}
"""The methods that a diagnosis can recommend, and the density with which each is tried."""

LAMBDAS = (0.3, 0.5, 0.7, 1.0)
"""Scales with which task arithmetic is tried."""


def compare(
    base: Tensor, members: list[Tensor], names: list[str], score: Callable[[Tensor], float], seed: int
) -> dict[str, Any]:
    """Score every method that a diagnosis can recommend, and task arithmetic with several lambdas.

    Args:
        names: of the members.
        score: of a merged vector; lower is better.

    Returns:
        the method that the diagnosis has ``chosen``, the ``best`` of its candidates and ``best_of_all``, the mean ``cosine``
        that the choice was made by, and the ``scores``.
    """
    whole = diagnose(base, members, names)
    scores = {name: score(merge(name, base, members, 1.0, density, seed)) for name, density in CANDIDATES.items()}
    best = min(scores, key=scores.__getitem__)
    for scale in LAMBDAS:
        scores[f"task_arithmetic {scale:g}"] = score(merge("task_arithmetic", base, members, scale))
    cosines = torch.tensor(whole["cosines"])
    rows, columns = torch.triu_indices(len(members), len(members), 1)
    return {
        "chosen": whole["recommendation"]["method"],
        "best": best,
        "best_of_all": min(scores, key=scores.__getitem__),
        "cosine": cosines[rows, columns].mean().item(),
        "scores": scores,
    }
