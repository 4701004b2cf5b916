"""The steps of a merge that need no torch, done first so that errors come early: pairing, configuration, small files."""

from __future__ import annotations

import re
from dataclasses import dataclass

from distmerge.errors import UserError
from distmerge.files.models import Model
from distmerge.merging.options import MergeOptions
from distmerge.merging.pairing import Pairing, pair
from distmerge.merging.recipe import Recipe
from distmerge.merging.record import identity, out_config, small_files

SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|KB|MB|GB)?", re.IGNORECASE)
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True)
class PreparedMerge:
    """A merge that has passed every check that is possible without torch.

    Attributes:
        models: by reference.
        pairings: every output tensor with its inputs.
        small: the contents of the small files beside the tensors, by name.
        shard_bytes: the largest amount of data in one shard.
        identity: a hash of all that the output's bytes depend on.
    """

    recipe: Recipe
    models: dict[str, Model]
    pairings: list[Pairing]
    small: dict[str, bytes]
    shard_bytes: int
    identity: str


def prepare(recipe: Recipe, models: dict[str, Model], shard_bytes: int, options: MergeOptions) -> PreparedMerge:
    """Pair the recipe's tensors, and make the small files beside them.

    Raises:
        UserError: when the models, or the recipe's parameters, do not fit together.
    """
    pairings = pair(recipe, models)
    config = out_config(recipe, models)
    if recipe.sliced and config:
        from distmerge.merging.stacking import check_loads, restacked

        config = restacked(recipe, models, config)
        check_loads(config, pairings)
    small = small_files(recipe, models, config)
    more = {"shards": shard_bytes, "stochastic": options.stochastic, "report": options.report}
    return PreparedMerge(recipe, models, pairings, small, shard_bytes, identity(recipe, models, more))


def parse_size(text: str) -> int:
    """The number of bytes in a text such as "5GB", "500MB" or "1000"."""
    match = SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise UserError(f"--shard-size must be a size such as 500MB or 5GB, got {text}")
    return size
