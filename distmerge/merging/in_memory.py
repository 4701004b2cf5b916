"""Merges in memory: models as flat vectors, the rules of :mod:`distmerge.rules` on all of theta at once.

The rules see one tensor, so a trim is global, as the TIES paper has it.
"""

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
from distmerge.rules import similarity
from distmerge.rules.dare import Dare
from distmerge.rules.linear import Linear
from distmerge.rules.protocol import Rule, Tally, run, spans
from distmerge.rules.random_masks import key_of
from distmerge.rules.sparsify import AtRandom, ByMagnitude
from distmerge.rules.task import Combine, Ptm, TaskVectors

METHODS = ("mean", "task_arithmetic", "ties", "dare", "dare_ties", "ptm")


def merge(method: str, base: Tensor, members: list[Tensor], scale: float = 1.0, density: float = 0.2, seed: int = 0) -> Tensor:
    """``[n]``: the merge of experts ``[n]`` each, trained from ``base [n]``.

    Args:
        method: "mean" of the task vectors, "task_arithmetic" (their sum), "ties", "dare" (the sum of what survives, rescaled
            by one over the density), "dare_ties" (the same, with signs elected); all times ``scale``. "ptm": the first member
            is the general model, to which ``scale`` times the others' task vectors are added.
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
    elected = Combine(elect="before", on_cancel="zero", divide="count", scale=scale)
    if method == "ties":
        trim = ByMagnitude([density] * count, None, "keep", torch.float32)
        return TaskVectors(ones, elected, trim if density < 1 else None, "none", torch.float32, numel)
    if method in ("dare", "dare_ties"):
        drop = AtRandom([density] * count, [key_of(seed, "theta", index) for index in range(count)])
        return Dare(ones, elected if method == "dare_ties" else plain, drop, "inverse", torch.float32, numel)
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


CANDIDATES: dict[str, tuple[str, float]] = {"linear": ("mean", 1.0), "ties": ("ties", 0.2), "dare_ties": ("dare_ties", 0.5)}
"""What the rule of correlation can recommend, as a method and density here."""

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
    scores = {name: score(merge(method, base, members, 1.0, density, seed)) for name, (method, density) in CANDIDATES.items()}
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
