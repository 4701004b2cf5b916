"""The verb ``diagnose``, and the report that ``merge`` asks for: the passes over the models behind ``diagnose.py``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.files.adapters import Factors
from distmerge.files.models import Model
from distmerge.files.sources import Maps
from distmerge.files.stream import Settings, Stream, in_memory
from distmerge.merging.diagnosis import Similarity, summarise, table
from distmerge.merging.execute import roles, settings_of
from distmerge.merging.jobs import build, open_source
from distmerge.merging.lora import leading_factors, similarity
from distmerge.merging.models import open_all
from distmerge.merging.pairing import Pairing, check_structure, pair
from distmerge.merging.recipe import Entry, Recipe, Slice
from distmerge.quiet import quiet
from distmerge.rules.similarity import overlap
from distmerge.theta.layers import place_of

RANK = 8


def run(options: argparse.Namespace) -> int:
    """Diagnose the models; print, write and draw what was asked for."""
    if len(options.models) < 2:
        raise UserError(f"distmerge diagnose needs at least two models beside --base, got {len(options.models)}")
    for index, model in enumerate(options.models):
        if model in (options.base, *options.models[:index]):
            raise UserError(f"distmerge diagnose takes each model once, and not its base, got {model} again")
    with quiet():
        report = report_of(options)
    print(json.dumps(report) if options.json else table(report))
    if options.plot:
        from distmerge.merging.plots import draw

        draw(report, Path(options.plot))
    if options.tensorboard:
        from distmerge.merging.plots import to_tensorboard

        to_tensorboard(report, Path(options.tensorboard))
    return 0


def report_of(options: argparse.Namespace) -> dict[str, Any]:
    """Everything that the flags ask to know."""
    recipe = mean_of(options.base, options.models)
    models = open_all(recipe, options.allow_pickle)
    report = diagnose(recipe, models, settings_of(options), subspaces=True)
    adapters = [models[reference].factors for reference in options.models]
    if all(adapters) and all(isinstance(change, Factors) and change.plain for one in adapters for change in one.values()):
        report["adapters"] = similarity(adapters, Maps())
    if options.files:
        from distmerge.merging.barrier import on_data

        directories = [directory_of(models[reference]) for reference in (options.base, *options.models)]
        report |= on_data(directories, options.files, options.sequence_length, options.sequences)
    return report


def directory_of(model: Model) -> str:
    """Where a whole model lies, to be loaded as one."""
    if model.factors:
        raise UserError(f"--files needs whole models, {model.reference} is an adapter: merge it with its base first")
    return str(model.directory)


def mean_of(base: str, models: list[str]) -> Recipe:
    """The plain mean of the task vectors: what a diagnosis looks at."""
    entries = tuple(Entry(model, {"weight": 1 / len(models)}) for model in models)
    return Recipe(method="task_arithmetic", slices=(Slice(entries),), base=base)


def diagnose(recipe: Recipe, models: dict[str, Model], settings: Settings, subspaces: bool = False) -> dict[str, Any]:
    """The report on a recipe's models, from one pass over them; with ``subspaces``, three more."""
    check_structure(recipe)
    pairings = pair(recipe, models)
    maps = Maps()
    with Stream(build(recipe, pairings, maps, []), settings, observer=Similarity()) as stream:
        notes = in_memory(stream, lambda job, offset, elements: None)
    report = summarise(notes, *roles(pairings[0]))
    if subspaces:
        report["subspaces"] = [entry for pairing in pairings for entry in overlaps(pairing, maps)]
    return report


def overlaps(pairing: Pairing, maps: Maps) -> list[dict[str, Any]]:
    """For a matrix in a layer: how much the leading ``RANK`` left singular directions of each pair of task vectors share."""
    if len(pairing.shape) != 2 or min(pairing.shape) < 2 * RANK or place_of(pairing.name) is None or pairing.base is None:
        return []
    base = open_source(pairing.base, maps)
    leading = [leading_factors(open_source(item, maps), base, pairing.shape, RANK)[0] for item in pairing.members]
    return [
        {"tensor": pairing.name, "pair": [i, j], "overlap": overlap(leading[i], leading[j])}
        for i in range(len(leading))
        for j in range(i + 1, len(leading))
    ]
