"""``distmerge merge``: a recipe to a model directory."""

from __future__ import annotations

import argparse
import os
import re
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from distmerge.errors import UserError
from distmerge.files.digests import Digests
from distmerge.files.models import recorded_files
from distmerge.files.output import refuse_existing
from distmerge.merging.models import open_all
from distmerge.merging.omegas import with_omegas
from distmerge.merging.pairing import check_structure, pair
from distmerge.merging.recipe import Recipe
from distmerge.merging.record import identity, out_config, small_files

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", re.IGNORECASE)
AUTO = "auto"
ADAPTER_METHODS = ("cat", "svd", "extract")
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def merge(recipe: Recipe, out: Path, options: argparse.Namespace) -> None:
    """Merge, and publish the directory ``out``.

    Raises:
        UserError: for anything wrong with the recipe, the models or the disk; nothing is left under the final name.
    """
    refuse_existing(out)
    shard_bytes = parse_size(options.shard_size)
    if recipe.method in ADAPTER_METHODS:
        from distmerge.merging.lora import merge_adapters

        merge_adapters(recipe, out, options)
        return
    if options.rank is not None:
        raise UserError(f"--rank is for svd and extract, got method {recipe.method}")
    if recipe.method == AUTO:
        recipe = recommended(recipe, options)
    check_structure(recipe)
    if options.report and (recipe.method == "passthrough" or len(recipe.references) < 2):
        raise UserError(f"--report compares models, got {recipe.method} of one at a time")
    models = open_all(recipe, options.allow_pickle)
    recipe = with_omegas(recipe, models)
    pairings = pair(recipe, models)
    config = out_config(recipe, models)
    if recipe.sliced and config:
        from distmerge.merging.stacking import prove, restacked

        config = restacked(recipe, models, config)
        prove(config, pairings)
    small = small_files(recipe, models, config)

    more = {"shards": shard_bytes, "stochastic": options.stochastic, "report": options.report}
    threads = options.threads or len(os.sched_getaffinity(0))
    with closing(Digests(threads, recorded_files(models.values()))) as digests:
        digests.begin(dict.fromkeys(item.stored.file for pairing in pairings for item in pairing.inputs))
        from distmerge.merging.execute import run  # imports torch, and all that can fail without it has been tried

        run(recipe, models, pairings, out, identity(recipe, models, more), shard_bytes, small, options, digests)


def recommended(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """The recipe with the method that a diagnosis of its models recommends; says so and why."""
    if recipe.base is None:
        raise UserError("method auto needs a base: the model that the others were trained from")
    from distmerge.merging.diagnose import diagnose, mean_of
    from distmerge.merging.execute import settings_of

    slice, *more = recipe.slices
    if more:
        raise UserError(f"method auto takes whole models, got {len(recipe.slices)} slices")
    bare = mean_of(recipe.base, [entry.model for entry in slice.entries if entry.model != recipe.base])
    chosen = diagnose(bare, open_all(bare, options.allow_pickle), settings_of(options))["recommendation"]
    print(f"method auto takes {chosen['method']}:", *(f"- {why}" for why in chosen["reasons"]), sep="\n")
    return replace(recipe, method=chosen["method"], parameters=chosen["parameters"] | recipe.parameters)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "1000"."""
    match = SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise UserError(f"--shard-size must be a size such as 500MB or 5GB, got {text}")
    return size
