"""Every step of a merge that can fail early, done before torch is imported: pairs, configuration, small files."""

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
    """A merge of which all that can be known to fail has been checked, without torch.

    Attributes:
        pairings: which tensors make which.
        small: the files beside the tensors, by name.
        identity: a hash of all that the output's bytes depend on.
    """

    recipe: Recipe
    models: dict[str, Model]
    pairings: list[Pairing]
    small: dict[str, bytes]
    shard_bytes: int
    identity: str


def prepare(recipe: Recipe, models: dict[str, Model], shard_bytes: int, options: MergeOptions) -> PreparedMerge:
    """Pair the tensors, and make the files beside them."""
    pairings = pair(recipe, models)
    config = out_config(recipe, models)
    if recipe.sliced and config:
        from distmerge.merging.stacking import prove, restacked

        config = restacked(recipe, models, config)
        prove(config, pairings)
    small = small_files(recipe, models, config)
    more = {"shards": shard_bytes, "stochastic": options.stochastic, "report": options.report}
    return PreparedMerge(recipe, models, pairings, small, shard_bytes, identity(recipe, models, more))


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB" or "1000"."""
    match = SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * UNITS[(match[2] or "B").upper()]) if match else 0
    if size < 1:
        raise UserError(f"--shard-size must be a size such as 500MB or 5GB, got {text}")
    return size
