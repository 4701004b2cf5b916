"""Turns pairings into jobs: opens each tensor's sources, and builds the catalogue's rule for it as the recipe asks."""

from __future__ import annotations

from dataclasses import replace

import torch

from distmerge.files.adapter_rows import adapted
from distmerge.files.header import FLOATS
from distmerge.files.sources import Cast, Maps, OnDisk, Source
from distmerge.files.stream import Job
from distmerge.merging.pairing import Input, Pairing
from distmerge.merging.recipe import DTYPES, Recipe
from distmerge.merging.vocabulary import Alignment
from distmerge.rules import catalogue
from distmerge.rules.passthrough import Same
from distmerge.rules.protocol import Target


def build(
    recipe: Recipe, pairings: list[Pairing], maps: Maps, thresholds: list[int], alignment: Alignment | None = None
) -> list[Job]:
    """The jobs of a recipe, one for each pairing.

    Args:
        thresholds: of a global trim; a survey fills this list before the merge.
        alignment: puts rows that are tokens into the output's order, where the recipe chooses a tokenizer.
    """
    form = catalogue.variants(recipe.method, recipe.compat, recipe.variants)
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
    target = Target(
        pairing.name, pairing.shape, pairing.each, pairing.shared, recipe.variants | {"compat": recipe.compat},
        arithmetic(form, opened), recipe.seed, pairing.vocabulary, thresholds,
    )  # fmt: skip
    rule = catalogue.build(recipe.method, target)
    if catalogue.entry(recipe.method).first == "base" and base is not None:
        members, base = (base, *members), None
    return Job(pairing.name, pairing.shape, DTYPES[out] if out else first, rule, members, base)


def observed(job: Job, pairing: Pairing, maps: Maps) -> Job:
    """The job with an origin for a report, where it has no base: the recipe's base, which the method does not use, or else the
    first member."""
    if job.base is not None or job.shape != pairing.shape:
        return job
    if pairing.origin is None:
        return replace(job, origin=job.members[0])
    return replace(job, origin=open_source(pairing.origin, maps)) if pairing.origin.stored.shape == job.shape else job


def open_source(item: Input, maps: Maps) -> Source:
    """The input's tensor, with its adapter applied."""
    base = OnDisk(item.stored, maps)
    if item.factors is None:
        return base
    return adapted(base, item.factors, maps)


def arithmetic(form: dict[str, str], inputs: list[Source]) -> torch.dtype:
    """The dtype in which a tensor is merged: float64 where an input is float64; else its own with arithmetic = "input", or
    float32."""
    if any(source.dtype == torch.float64 for source in inputs):
        return torch.float64
    return inputs[0].dtype if form["arithmetic"] == "input" else torch.float32
