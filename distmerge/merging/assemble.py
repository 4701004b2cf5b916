"""Builds a recipe from what the flags or the Python API give: a method's name, models and parameters, or a file.

Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.merging import recipe_mergekit, recipe_toml
from distmerge.merging.options import MergeOptions
from distmerge.merging.recipe import Recipe, Setting, check_dtype
from distmerge.rules import catalogue
from distmerge.rules.parameters import PARAMETERS, VARIANTS, is_variant

RECIPE_BYTES = 1 << 20
"""The largest number of characters in a recipe."""

Factor = float | str
"""A model's weight, or omega: a number, or its text from the command line."""

Models = Sequence[str | Path | tuple[str | Path, Factor]] | Mapping[str, Factor]
"""Models to be merged, in order, each with its weight (for wise_ft and ptm: its omega) where one is given."""


@dataclass(frozen=True)
class Named:
    """A model to be merged.

    Attributes:
        model: its directory or hub id.
        factor: its weight or omega; None where none was given.
    """

    model: str
    factor: Factor | None = None


def named(models: Models) -> list[Named]:
    """Models in any of the forms that the Python API accepts, as a list of ``Named``."""
    if isinstance(models, Mapping):
        return [Named(str(model), factor) for model, factor in models.items()]
    return [Named(str(item[0]), item[1]) if isinstance(item, tuple) else Named(str(item)) for item in models]


def recipe_of(
    method: str, models: Sequence[Named], base: str | None, general: str | None,
    parameters: Mapping[str, Setting], options: MergeOptions,
) -> Recipe:  # fmt: skip
    """The recipe that merges whole models by a method.

    Args:
        parameters: the method's parameters and variants, by the names of the TOML notation.

    Raises:
        UserError: for an unknown key, or a weight where the method takes none.
    """
    table: dict[str, Any] = {"method": method, "base": base, "general": general, "compat": options.compat}
    table |= {"seed": options.seed, "dtype": options.dtype, "out_dtype": options.out_dtype, "tokenizer": options.tokenizer}
    table |= dict(parameters)
    # "auto" and the methods that make adapters are not rules of the catalogue.
    own = catalogue.entry(method).parameters if catalogue.is_known(method) else ("weight",)
    factor = "omega" if "omega" in own else "weight"
    table["model"] = [model_table(method, item, factor, factor in own) for item in models]
    return recipe_toml.from_table({key: value for key, value in table.items() if value is not None}, "")


def model_table(method: str, item: Named, factor: str, takes: bool) -> dict[str, Any]:
    """One [[model]] of the TOML notation. A weight that is not given is 1; an omega that is not given is left out, to be
    computed later.

    Args:
        takes: whether the method has the ``factor`` at all.
    """
    value = "1" if item.factor is None and factor == "weight" else item.factor
    if value is not None and not takes and str(value) != "1":
        raise UserError(f"{method} takes no weights, got --model {item.model}:{value}")
    return {"path": item.model} | ({factor: value} if takes and value is not None else {})


def check_parameters(given: Mapping[str, Setting], method: str | None = None) -> dict[str, Setting]:
    """Check parameters and variants given as keyword arguments in Python, where lambda is written ``lambda_``.

    Args:
        method: whose parameters they are. Naming it loads a rule of an installed package, which can add parameters.

    Returns:
        them, by the names of the TOML notation.

    Raises:
        UserError: naming the first that no method has.
    """
    if method is not None:
        catalogue.is_known(method)
    found = {key.removesuffix("_"): value for key, value in given.items()}
    for key in found:
        if key not in PARAMETERS and key not in VARIANTS:
            raise UserError(f"{key} is not a parameter of any method; known: {', '.join({**PARAMETERS, **VARIANTS})}")
    return found


def check_grid(parameter: str, values: Sequence[float]) -> None:
    """Check the grid of a sweep: it must have values, all finite, of a numeric parameter.

    Raises:
        UserError: saying what a grid must be.
    """
    known = parameter in PARAMETERS and PARAMETERS[parameter].holds is not None
    if not known or not values or not all(math.isfinite(value) for value in values):
        said = f"{parameter}={','.join(map(str, values))}"
        raise UserError(f"--grid must be PARAMETER=X,Y,... such as lambda=0.2,0.4, got {said}")


def recipe_in_file(path: str, parameters: Mapping[str, Setting], options: MergeOptions) -> Recipe:
    """The recipe in a file. Only its compat, seed, dtypes and variants can be overridden.

    Args:
        parameters: variants that override the file's. Parameters and the tokenizer must be written in the file instead.

    Raises:
        UserError: when the file cannot be read or is not a recipe, or for an option that must be written in the file.
    """
    recipe = read_recipe(path)
    for key in [*(key for key in PARAMETERS if key not in VARIANTS), "tokenizer"]:
        if key in parameters or (key == "tokenizer" and options.tokenizer is not None):
            raise UserError(f"--{key.replace('_', '-')} belongs to a recipe in flags; write it into {path}")
    for key, value in parameters.items():
        if not is_variant(key, value):
            raise UserError(f"--{key} {value} belongs to a recipe in flags; write it into {path}")
    return replace(
        recipe,
        variants=recipe.variants | {key: str(parameters[key]) for key in VARIANTS if key in parameters},
        compat=options.compat or recipe.compat,
        seed=recipe.seed if options.seed is None else options.seed,
        dtype=check_dtype("--dtype", options.dtype) or recipe.dtype,
        out_dtype=check_dtype("--out-dtype", options.out_dtype) or recipe.out_dtype,
    )


def read_recipe(path: str) -> Recipe:
    """Read the recipe in a file, whose suffix gives the notation.

    Raises:
        UserError: when it cannot be read, or is not a valid recipe.
    """
    if not path.endswith((".yaml", ".yml", ".toml")):
        raise UserError(f"a recipe must be a .yaml, .yml or .toml file, got {path}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(RECIPE_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > RECIPE_BYTES:
        raise UserError(f"a recipe must have at most {RECIPE_BYTES} characters, but {path} has more")
    return recipe_toml.parse(text) if path.endswith(".toml") else recipe_mergekit.parse(text)
