"""Merges in memory: models as flat vectors, the catalogue's rules on all of theta at once."""

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
from distmerge.merging.pairing import take
from distmerge.rules import catalogue, similarity
from distmerge.rules.mean import WeightedMean
from distmerge.rules.protocol import Tally, Target, run, spans


def merge(
    method: str, base: Tensor, members: list[Tensor], scale: float | list[float] = 1.0, density: float = 0.2, seed: int = 0
) -> Tensor:
    """``[n]``: the merge of models ``[n]`` each, trained from ``base [n]``, by a rule of the catalogue in its paper's form.

    All of theta is one tensor, so a trim is of the whole model. ``scale`` is lambda, by which the merged task vector is
    multiplied, or omega, for rules that have it: then there may be one for each member beside the general model.

    Args:
        method: a name in the catalogue. Where it has a general model, as ptm, that is the first member.
        density: share of each task vector that rules keep which thin them.
        seed: of random masks.
    """
    name, entry = catalogue.canonical(method), catalogue.entry(method)
    each = [{"weight": 1.0, "density": density} for _ in members]
    if "omega" in entry.parameters:
        skills = len(members) - (entry.first == "general")
        omegas = scale if isinstance(scale, list) else [scale] * skills
        each = [{"omega": omega} for omega in [*[0.0] * (len(members) - skills), *omegas]]
        scale = 1.0
    assert not isinstance(scale, list), "only omegas are each member's own"
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
    """``(1 - share) one + share two``: linear interpolation, and WiSE-FT from a model to its finetuned self."""
    return run(WeightedMean([1 - share, share]), [one, two])


def read_model(reference: str, base: str) -> dict[str, Tensor]:
    """A model's tensors in float32, an adapter on ``base`` added in.

    Raises:
        UserError: when there is none.
    """
    models = open_all(mean_of(base, [reference]), allow_pickle=False)
    maps, model = Maps(), models[reference]
    found: dict[str, Tensor] = {}
    for name, stored in model.tensors.items():
        source = open_source(take(model, name), maps)
        found[name] = source.read(0, stored.numel).view(source.shape).float()
    return found


def diagnose(base: Tensor, members: list[Tensor], names: list[str]) -> dict[str, Any]:
    """Cosines, norms, conflicts and the recommendation of ``distmerge diagnose``, for vectors."""
    tally = Tally()
    for index, (start, stop) in enumerate(spans(base.numel(), 1)):
        tally.add(index, similarity.measure(torch.stack([member[start:stop] - base[start:stop] for member in members])))
    report = summarise(
        {"theta": similarity.settle(tally) | {"rounding": [0.0, 1.0], "each": [0.0] * len(members)}}, names, "the base"
    )
    whole = report.as_dict()
    return whole["whole"] | {"recommendation": whole["recommendation"]}


CANDIDATES = {"mean": 1.0, "ties": 0.2, "dare_ties": 0.5}
"""The methods that the rule of correlation can recommend, and the density with which each is tried."""

LAMBDAS = (0.3, 0.5, 0.7, 1.0)


def compare(
    base: Tensor, members: list[Tensor], names: list[str], score: Callable[[Tensor], float], seed: int
) -> dict[str, Any]:
    """The methods that the rule of correlation chooses among, and task arithmetic at several lambdas, each measured.

    Args:
        score: of a merged vector; lower is better.

    Returns:
        ``chosen`` by the rule, ``best`` of its candidates and ``best_of_all``, the ``cosine`` it went by, the ``scores``.
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
