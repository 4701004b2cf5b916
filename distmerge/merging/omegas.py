"""The default omega of ``ptm``, by which it adds a skill's task vector: |D| / |G|, the ratio of two models' training tokens.

Imports no torch.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from distmerge.errors import UserError
from distmerge.files.models import Model
from distmerge.merging.recipe import Entry, Recipe, Slice
from distmerge.rules import catalogue


def with_omegas(recipe: Recipe, models: dict[str, Model]) -> tuple[Recipe, tuple[str, ...]]:
    """Fill in the omega of every skill of a ptm recipe that has none.

    Returns:
        the recipe with all omegas, and for each that was filled in a line that says how it was computed.

    Raises:
        UserError: when a model's training tokens are not recorded.
    """
    if catalogue.entry(recipe.method).first != "general" or "omega" in recipe.parameters:
        return recipe, ()
    slices: list[Slice] = []
    notes: list[str] = []
    for slice in recipe.slices:
        entries: list[Entry] = []
        for entry in slice.entries:
            if "omega" in entry.parameters or entry.model in (recipe.general, recipe.base):
                entries.append(entry)
                continue
            omega, note = omega_of(models[entry.model], models[str(recipe.general)])
            entries.append(replace(entry, parameters=entry.parameters | {"omega": omega}))
            notes.append(note)
        slices.append(Slice(tuple(entries), slice.base, slice.parameters))
    return replace(recipe, slices=tuple(slices)), tuple(notes)


def omega_of(skill: Model, general: Model) -> tuple[float, str]:
    """The skill's omega from its own training tokens and the general model's, and a line that says how it was computed."""
    d, g = (trained_tokens(model.adapter or model.directory, skill.reference) for model in (skill, general))
    said = f"omega of {skill.reference}: {d} / {g} training tokens = {d / g:.4g}"
    return token_ratio(d, g), said + (", limited to 1" if d > g else "")


def trained_tokens(directory: Path, skill: str) -> int:
    """How many tokens the model in a directory was trained on.

    Args:
        skill: the model whose omega is wanted; the error names it.

    Raises:
        UserError: when training.json is missing or has no number of tokens.
    """
    path = directory / "training.json"
    try:
        tokens = json.loads(path.read_bytes())["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        tokens = None
    if type(tokens) is not int or tokens <= 0:
        raise UserError(f"omega must be given for {skill}: {path} does not say on how many tokens it was trained")
    return tokens


def token_ratio(skill: int, general: int) -> float:
    """|D| / |G|, the skill's training tokens over the general model's, at most 1: an omega chosen without a validation set.

    Source: Merge to Learn, https://arxiv.org/abs/2410.12937
    """
    return min(1.0, skill / general)
