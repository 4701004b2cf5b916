"""From pairings to jobs: the rule of each tensor, with the method's form as the recipe has it."""

from __future__ import annotations

from dataclasses import replace

import torch

from distmerge.errors import UserError
from distmerge.files.adapter_rows import adapted
from distmerge.files.header import FLOATS
from distmerge.files.sources import Cast, Maps, OnDisk, Source
from distmerge.files.stream import Job
from distmerge.merging.methods import METHODS, divisor, variants
from distmerge.merging.pairing import Input, Pairing, half_width
from distmerge.merging.recipe import DTYPES, Recipe
from distmerge.merging.vocabulary import Alignment
from distmerge.rules.consensus import ModelStock, Sce
from distmerge.rules.dare import Dare
from distmerge.rules.linear import Linear, Same, Scaled
from distmerge.rules.protocol import Rule
from distmerge.rules.random_masks import key_of
from distmerge.rules.slerp import Nuslerp, Slerp
from distmerge.rules.sparsify import AtRandom, ByMagnitude, Magprune
from distmerge.rules.task import Combine, GlobalTrim, Ptm, Sparsifier, TaskArithmetic, TaskVectors, rescaling_dtype


def build(
    recipe: Recipe, pairings: list[Pairing], maps: Maps, thresholds: list[int], alignment: Alignment | None = None
) -> list[Job]:
    """The jobs of a recipe.

    Args:
        thresholds: filled in by a survey where the trim is global.
        alignment: of the rows that are tokens, where the recipe chooses a tokenizer.
    """
    form = variants(recipe.method, recipe.compat, recipe.variants)
    return [job(recipe, form, pairing, maps, thresholds, alignment) for pairing in pairings]


def job(
    recipe: Recipe, form: dict[str, str], pairing: Pairing, maps: Maps, thresholds: list[int], alignment: Alignment | None
) -> Job:
    floating = pairing.members[0].stored.dtype in FLOATS
    first = pairing.inputs[0].stored.dtype
    opened: list[Source] = [open_source(item, maps) for item in pairing.inputs]
    if alignment is not None and pairing.vocabulary:
        opened = alignment.align([item.model for item in pairing.inputs], opened)
        pairing = pairing._replace(shape=opened[0].shape)
    if floating and recipe.dtype:
        opened = [Cast(source, getattr(torch, recipe.dtype)) for source in opened]
    base, members = (None, tuple(opened)) if pairing.base is None else (opened[0], tuple(opened[1:]))
    if not floating:
        return Job(pairing.name, pairing.shape, first, Same(), members, base)
    out = recipe.out_dtype or recipe.dtype
    rule = rule_of(recipe, form, pairing, arithmetic(form, opened), thresholds)
    if recipe.method == "slerp" and base is not None:
        members, base = (base, *members), None
    return Job(pairing.name, pairing.shape, DTYPES[out] if out else first, rule, members, base)


def observed(job: Job, pairing: Pairing, maps: Maps) -> Job:
    """The job with an origin for a report: the recipe's base, though the method has no use for it, or else the first member."""
    if job.base is not None or job.shape != pairing.shape:
        return job
    if pairing.origin is None:
        return replace(job, origin=job.members[0])
    return replace(job, origin=open_source(pairing.origin, maps)) if pairing.origin.stored.shape == job.shape else job


def open_source(item: Input, maps: Maps) -> Source:
    """The input's tensor, with its adapter."""
    base = OnDisk(item.stored, maps)
    if item.factors is None:
        return base
    return adapted(base, item.factors, maps)


def arithmetic(form: dict[str, str], inputs: list[Source]) -> torch.dtype:
    """The dtype in which a tensor is merged: its own ("input"), or float32, float64 where an input is that."""
    if any(source.dtype == torch.float64 for source in inputs):
        return torch.float64
    return inputs[0].dtype if form["arithmetic"] == "input" else torch.float32


def rule_of(recipe: Recipe, form: dict[str, str], pairing: Pairing, dtype: torch.dtype, thresholds: list[int]) -> Rule:
    shared, each = pairing.shared, pairing.each
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    columns = pairing.shape[-1] if pairing.shape else 1
    match recipe.method:
        case "linear":
            return Linear([one["weight"] for one in each], shared["normalize"] is not False, wide)
        case "slerp":
            return Slerp(shared["t"], wide)
        case "nuslerp":
            return Nuslerp(share_of_second(pairing), *vectors_of(pairing), dtype)
        case "wise_ft":
            return TaskArithmetic([each[0]["omega"]], Combine(), wide)
        case "ptm":
            return Ptm([skill["omega"] for skill in each[1:]], wide)
        case "model_stock":
            return ModelStock(
                len(each), columns if shared["filter_wise"] else None, dtype, 1e-6 if recipe.compat == "mergekit" else 1e-30
            )
        case "sce":
            return Sce(shared["select_topk"], numel_of(pairing), dtype)
        case "passthrough":
            return Scaled(each[0]["scale"], dtype)
    return task_vectors(recipe, form, pairing, dtype, thresholds)


def task_vectors(recipe: Recipe, form: dict[str, str], pairing: Pairing, dtype: torch.dtype, thresholds: list[int]) -> Rule:
    shared, method = pairing.shared, METHODS[recipe.method]
    divide = divisor(recipe.method, recipe.compat, recipe.variants, shared)
    combine = Combine(form["elect"] if method.elect else "none", form["on_cancel"], divide, shared["lambda"])
    weights = [one["weight"] for one in pairing.each]
    rescale = rescaling(recipe, form, pairing)
    if method.sparsify == "magnitude" and form["trim"] == "global":
        if rescale != "none":
            raise UserError('rescale needs trim = "tensor": a global trim is not rescaled')
        return GlobalTrim(weights, combine, thresholds)
    thin, unit = sparsifier(recipe, form, pairing, dtype)
    if thin is None and combine.elect == "none":
        return TaskArithmetic(weights, combine, dtype)
    kind = Dare if isinstance(thin, AtRandom) else TaskVectors
    return kind(weights, combine, thin, rescale, dtype, numel_of(pairing), unit)


def rescaling(recipe: Recipe, form: dict[str, str], pairing: Pairing) -> str:
    method, asked = METHODS[recipe.method], pairing.shared.get("rescale")
    if asked is None:
        asked = method.rescale or "rescale" in recipe.variants
    if not asked or method.sparsify is None:
        return "none"
    if form["rescale"] == "inverse" and method.sparsify in ("magnitude", "outliers"):
        raise UserError(f'rescale = "inverse" needs odds, which {recipe.method} does not have; take "l1" or "none"')
    return form["rescale"]


def sparsifier(recipe: Recipe, form: dict[str, str], pairing: Pairing, dtype: torch.dtype) -> tuple[Sparsifier | None, int]:
    """What thins the task vectors out, and the elements that no block may divide."""
    kind = METHODS[recipe.method].sparsify
    if kind is None:
        return None, 1
    density = [one["density"] for one in pairing.each]
    if all(value >= 1 for value in density):
        return None, 1
    keys = [key_of(recipe.seed, pairing.name, index) for index in range(len(density))]
    if kind == "random":
        # mergekit draws with a probability of the tensors' dtype; 0.6 is 0.6016 in bfloat16.
        return AtRandom([float(torch.tensor(value, dtype=rescaling_dtype(dtype))) for value in density], keys), 1
    if kind == "magprune":
        columns = max(1, pairing.shape[-1] if pairing.shape else 1)
        half = [half_width(recipe, one["epsilon"]) for one in pairing.each]
        return Magprune(density, half, keys, columns, dtype), columns
    gamma = [one["gamma"] for one in pairing.each] if kind == "outliers" else None
    return ByMagnitude(density, gamma, form["on_tie"], dtype), 1


def share_of_second(pairing: Pairing) -> float:
    first, second = (one["weight"] for one in pairing.each)
    return 0.5 if abs(first + second) < 1e-6 else second / (first + second)


def vectors_of(pairing: Pairing) -> tuple[int | None, bool]:
    """What NuSLERP takes as vectors: (None, _) the tensor, (columns, True) its rows, (columns, False) its columns."""
    if pairing.shared["nuslerp_flatten"] or len(pairing.shape) == 0:
        return None, False
    by_row = not pairing.shared["nuslerp_row_wise"]
    if not by_row and len(pairing.shape) > 2:
        raise UserError(f"nuslerp_row_wise takes tensors of at most 2 dimensions, {pairing.name} has {len(pairing.shape)}")
    return max(1, pairing.shape[-1]), by_row or len(pairing.shape) == 1


def numel_of(pairing: Pairing) -> int:
    return int(torch.Size(pairing.shape).numel())
