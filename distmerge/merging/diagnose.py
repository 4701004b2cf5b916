"""Runs the passes over models that a diagnosis needs, for ``distmerge diagnose`` and for the method "auto"."""

from __future__ import annotations

from dataclasses import replace

from distmerge.errors import UserError
from distmerge.files.adapters import Factors
from distmerge.files.models import Model
from distmerge.files.sources import Maps
from distmerge.files.stream import Settings, Stream, in_memory
from distmerge.merging.diagnosis import Diagnosis, Similarity, SubspaceOverlap, summarise
from distmerge.merging.execute import roles, settings_of
from distmerge.merging.jobs import build, open_source
from distmerge.merging.lora import leading_factors, similarity
from distmerge.merging.models import open_all
from distmerge.merging.options import DiagnoseOptions
from distmerge.merging.pairing import Pairing, check_structure, pair
from distmerge.merging.recipe import Entry, Recipe, Slice
from distmerge.rules.similarity import overlap
from distmerge.theta.layers import place_of

RANK = 8
"""How many leading singular directions of a task vector are compared."""


def diagnose_models(references: list[str], base: str, options: DiagnoseOptions) -> Diagnosis:
    """Diagnose models that were trained from ``base``.

    Raises:
        UserError: for fewer than two models, a model that is named twice, or anything wrong with the models or the text.
    """
    if len(references) < 2:
        raise UserError(f"distmerge diagnose needs at least two models besides --base, got {len(references)}")
    for index, model in enumerate(references):
        if model in (base, *references[:index]):
            raise UserError(f"distmerge diagnose takes each model once, and not the base itself, got {model} again")
    recipe = mean_of(base, references)
    models = open_all(recipe, options.allow_pickle)
    report = diagnose_recipe(recipe, models, settings_of(options), subspaces=True)
    adapters = [models[reference].factors for reference in references]
    if all(adapters) and all(isinstance(change, Factors) and change.plain for one in adapters for change in one.values()):
        report = replace(report, adapters=similarity(adapters, Maps()))
    if options.files:
        from distmerge.merging.barrier import on_data

        directories = [directory_of(models[reference]) for reference in (base, *references)]
        text = options.text
        report = replace(report, on_text=on_data(directories, list(options.files), text.sequence_length, text.sequences))
    return report


def directory_of(model: Model) -> str:
    """The directory from which a whole model can be loaded."""
    if model.factors:
        raise UserError(f"--files needs whole models, but {model.reference} is an adapter; merge it with its base first")
    return str(model.directory)


def mean_of(base: str, models: list[str]) -> Recipe:
    """The recipe for the plain mean of the task vectors, which is the merge that a diagnosis examines."""
    entries = tuple(Entry(model, {"weight": 1 / len(models)}) for model in models)
    return Recipe(method="task_arithmetic", slices=(Slice(entries),), base=base)


def diagnose_recipe(recipe: Recipe, models: dict[str, Model], settings: Settings, subspaces: bool = False) -> Diagnosis:
    """The diagnosis of a recipe's models, from one pass over them.

    Args:
        subspaces: compare the leading subspaces of the task vectors as well, with several more passes over each matrix.
    """
    check_structure(recipe)
    pairings = pair(recipe, models)
    maps = Maps()
    with Stream(build(recipe, pairings, maps, []), settings, observer=Similarity()) as stream:
        notes = in_memory(stream, lambda job, offset, elements: None)
    report = summarise(notes, *roles(pairings[0]))
    if not subspaces:
        return report
    return replace(report, subspaces=[entry for pairing in pairings for entry in overlaps(pairing, maps)])


def overlaps(pairing: Pairing, maps: Maps) -> list[SubspaceOverlap]:
    """For a matrix in a layer, the overlap of the leading ``RANK`` left singular directions of each pair of task vectors; for
    other tensors, and small matrices, []."""
    if len(pairing.shape) != 2 or min(pairing.shape) < 2 * RANK or place_of(pairing.name) is None or pairing.base is None:
        return []
    base = open_source(pairing.base, maps)
    leading = [leading_factors(open_source(item, maps), base, pairing.shape, RANK)[0] for item in pairing.members]
    return [
        SubspaceOverlap(pairing.name, (i, j), overlap(leading[i], leading[j]))
        for i in range(len(leading))
        for j in range(i + 1, len(leading))
    ]
