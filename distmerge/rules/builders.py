"""From a target to its rule: what ``distmerge.rules.catalogue`` has names for."""

from __future__ import annotations

from typing import Any

import torch

from distmerge.errors import UserError
from distmerge.rules.combine import Combine
from distmerge.rules.dare import Dare
from distmerge.rules.mean import WeightedMean
from distmerge.rules.parameters import half_width
from distmerge.rules.passthrough import Scaled
from distmerge.rules.protocol import Rule, Target, wide
from distmerge.rules.radial import Radial
from distmerge.rules.random_masks import key_of
from distmerge.rules.robust import Median, TrimmedMean
from distmerge.rules.sce import Sce
from distmerge.rules.slerp import Nuslerp, Slerp
from distmerge.rules.sparsify import AtRandom, ByMagnitude, Magprune
from distmerge.rules.stock import ModelStock
from distmerge.rules.task import (
    GlobalTrim,
    Ptm,
    Sparsifier,
    TaskArithmetic,
    TaskVectors,
    rescaling_dtype,
    whole_vectors,
)


def of_each(target: Target, key: str) -> list[Any]:
    """The values of one parameter, in the order of the members."""
    return [one[key] for one in target.each]


def mean(target: Target) -> Rule:
    return WeightedMean(of_each(target, "weight"), target.shared["normalize"], wide(target.dtype))


def radial(target: Target) -> Rule:
    """The radial mean; but the plain mean for an embedding, whose rows are vectors of their own, many hardly trained."""
    if target.embedding:
        return WeightedMean(of_each(target, "weight"), True, wide(target.dtype))
    return Radial(of_each(target, "weight"), wide(target.dtype))


def median(target: Target) -> Rule:
    return Median(wide(target.dtype))


def trimmed_mean(target: Target) -> Rule:
    return TrimmedMean(target.shared["trim"], wide(target.dtype))


def slerp(target: Target) -> Rule:
    return Slerp(target.shared["t"], wide(target.dtype))


def nuslerp(target: Target) -> Rule:
    first, second = of_each(target, "weight")
    share = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    return Nuslerp(share, *vectors_of(target), target.dtype)


def vectors_of(target: Target) -> tuple[int | None, bool]:
    """What NuSLERP takes as vectors: (None, _) is the tensor, (columns, True) its rows, (columns, False) its columns."""
    if target.shared["nuslerp_flatten"] or len(target.shape) == 0:
        return None, False
    by_row = not target.shared["nuslerp_row_wise"]
    if not by_row and len(target.shape) > 2:
        raise UserError(f"nuslerp_row_wise takes tensors of at most 2 dimensions, {target.name} has {len(target.shape)}")
    return target.columns, by_row or len(target.shape) == 1


def wise_ft(target: Target) -> Rule:
    return TaskArithmetic(of_each(target, "omega"), Combine(), wide(target.dtype))


def ptm(target: Target) -> Rule:
    return Ptm(of_each(target, "omega")[1:], wide(target.dtype))


def model_stock(target: Target) -> Rule:
    columns = (target.shape[-1] if target.shape else 1) if target.shared["filter_wise"] else None
    floor = 1e-6 if target.variants["compat"] == "mergekit" else 1e-30
    sums = torch.float64 if target.variants["compat"] == "workers" else None
    return ModelStock(len(target.each), columns, target.dtype, floor, sums)


def sce(target: Target) -> Rule:
    return Sce(target.shared["select_topk"], target.numel, target.dtype)


def passthrough(target: Target) -> Rule:
    (one,) = of_each(target, "scale")
    return Scaled(one, target.dtype)


def task_vectors(target: Target) -> Rule:
    """Task arithmetic and its descendants, by the form that ``target.variants`` has."""
    form, weights = target.variants, of_each(target, "weight")
    combine = Combine(form["elect"], form["on_cancel"], form["divide"], target.shared["lambda"])
    rescale = rescaling(target)
    if form["sparsify"] == "magnitude" and form["trim"] == "global":
        if rescale != "none":
            raise UserError('rescale needs trim = "tensor": a global trim is not rescaled')
        return GlobalTrim(weights, combine, target.thresholds)
    thin = sparsifier(target)
    if thin is None:
        return whole_vectors(weights, combine, target.dtype, target.numel)
    kind = Dare if isinstance(thin, AtRandom) else TaskVectors
    unit = thin.columns if isinstance(thin, Magprune) else 1
    return kind(weights, combine, thin, rescale, target.dtype, target.numel, unit)


def rescaling(target: Target) -> str:
    """How what survives is rescaled: "inverse", "l1" or "none"."""
    thinned, form = target.variants["sparsify"], target.variants["rescale"]
    if thinned == "none" or not target.shared["rescale"]:
        return "none"
    if form == "inverse" and thinned in ("magnitude", "outliers"):
        raise UserError('rescale = "inverse" needs odds, which a trim by magnitude does not have; take "l1" or "none"')
    return form


def sparsifier(target: Target) -> Sparsifier | None:
    """The sparsifier of the task vectors; None if everything is kept."""
    kind = target.variants["sparsify"]
    if kind == "none":
        return None
    density = of_each(target, "density")
    if all(value >= 1 for value in density):
        return None
    keys = [key_of(target.seed, target.name, index) for index in range(len(density))]
    if kind == "random":
        # mergekit draws with a probability of the tensors' dtype; 0.6 is 0.6016 in bfloat16.
        return AtRandom([float(torch.tensor(value, dtype=rescaling_dtype(target.dtype))) for value in density], keys)
    if kind == "magprune":
        half = [half_width(target.variants, epsilon) for epsilon in of_each(target, "epsilon")]
        return Magprune(density, half, keys, target.columns, target.dtype)
    gamma = of_each(target, "gamma") if kind == "outliers" else None
    return ByMagnitude(density, gamma, target.variants["on_tie"], target.dtype)
