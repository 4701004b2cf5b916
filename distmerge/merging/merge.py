"""Merges a recipe's models into a directory. Everything that can be checked without torch is checked before importing it."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

from distmerge.errors import UserError
from distmerge.files.digests import Digests
from distmerge.files.models import recorded_files
from distmerge.files.output import refuse_existing
from distmerge.merging.models import open_all
from distmerge.merging.omegas import with_omegas
from distmerge.merging.options import MergeOptions
from distmerge.merging.pairing import check_structure
from distmerge.merging.prepare import parse_size, prepare
from distmerge.merging.recipe import Recipe
from distmerge.merging.results import MergeResult
from distmerge.rules import catalogue

AUTO = "auto"
ADAPTER_METHODS = ("cat", "svd", "extract")


def merge_models(recipe: Recipe, out: Path, options: MergeOptions) -> MergeResult:
    """Merge a recipe and publish the directory ``out``.

    Raises:
        UserError: for anything wrong with the recipe, the models or the disk; ``out`` does not exist then.
    """
    refuse_existing(out)
    shard_bytes = parse_size(options.shard_size)
    if recipe.method in ADAPTER_METHODS:
        from distmerge.merging.lora import merge_adapters

        return merge_adapters(recipe, out, options)
    if options.rank is not None:
        raise UserError(f"--rank is only for the methods svd and extract, got method {recipe.method}")
    notes: tuple[str, ...] = ()
    if recipe.method == AUTO:
        recipe, notes = recommended(recipe, options)
    check_structure(recipe)
    if options.report and (not catalogue.entry(recipe.method).compares or len(recipe.references) < 2):
        raise UserError(f"--report needs a method that merges several models, got {recipe.method} of one at a time")
    models = open_all(recipe, options.allow_pickle)
    recipe, said = with_omegas(recipe, models)
    prepared = prepare(recipe, models, shard_bytes, options)

    with closing(Digests(options.thread_count, recorded_files(models.values()))) as digests:
        digests.begin(dict.fromkeys(item.stored.file for pairing in prepared.pairings for item in pairing.inputs))
        from distmerge.merging.execute import execute  # imports torch, which is slow, after every check that works without it

        return replace(execute(prepared, out, options, digests), notes=notes + said)


def recommended(recipe: Recipe, options: MergeOptions) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with the method that a diagnosis of its models recommends, and the reasons, one line each."""
    if recipe.base is None:
        raise UserError("method auto needs a base: the model that the others were trained from")
    from distmerge.merging.diagnose import diagnose_recipe, mean_of
    from distmerge.merging.execute import settings_of

    slice, *more = recipe.slices
    if more:
        raise UserError(f"method auto needs whole models, got {len(recipe.slices)} slices")
    bare = mean_of(recipe.base, [entry.model for entry in slice.entries if entry.model != recipe.base])
    chosen = diagnose_recipe(bare, open_all(bare, options.allow_pickle), settings_of(options)).recommendation
    assert chosen is not None, "a diagnosis with a base recommends a method"
    notes = (f"method auto chose {chosen.method}:", *(f"- {why}" for why in chosen.reasons))
    return replace(recipe, method=chosen.method, parameters=chosen.parameters | recipe.parameters), notes
