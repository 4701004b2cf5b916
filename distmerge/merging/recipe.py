"""A recipe: which models are merged, how, and with which parameters. ``recipe_toml.py`` and ``recipe_mergekit.py`` read its two
notations.

Imports no torch, so that errors in a recipe are reported at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

from distmerge.errors import UserError
from distmerge.merging.json_types import Json, is_list, is_table
from distmerge.rules.parameters import is_number

Setting = Json
"""A parameter as written: a scalar; a list of scalars, which is a gradient over the layers; or a list of {value, filter}."""

SHARD_SIZE = "5GB"
"""The default for the largest file of an output."""

DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class Entry:
    """One input of a slice.

    Attributes:
        model: a directory, a hub id, or "BASE+ADAPTER".
        parameters: of this model alone.
        layers: ``[first, stop)``; None for the whole model.
    """

    model: str
    parameters: dict[str, Setting] = field(default_factory=dict[str, Setting])
    layers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Slice:
    """A run of output layers, merged from equally many layers of every entry; or the whole model.

    Attributes:
        base: in place of the recipe's base.
        parameters: of all entries; they take precedence over the recipe's.
    """

    entries: tuple[Entry, ...]
    base: str | None = None
    parameters: dict[str, Setting] = field(default_factory=dict[str, Setting])


@dataclass(frozen=True)
class Tokenizer:
    """Which tokenizer the output gets.

    Attributes:
        source: "base", "union" or a model of the recipe.
    """

    source: str


@dataclass(frozen=True)
class Recipe:
    """A merge as it was asked for.

    Attributes:
        method: a name in ``distmerge.rules.catalogue``, not an alias; or "auto", "greedy_soup", "cat", "svd" or "extract".
        slices: a single one without layer ranges merges whole models.
        base: the model that task vectors start from.
        general: the model to which ``ptm`` adds the skills.
        parameters: for all models and layers.
        variants: ``trim``, ``elect`` ...; variants that are not set follow from ``compat``.
        compat: "mergekit" or "paper": whose form of a method is computed.
        dtype: round the inputs to it first; None leaves them as they are.
        out_dtype: the output's dtype; None for ``dtype`` if that is set, else each tensor's own.
        tokenizer: None keeps that of ``donor``.
        chat_template: a Jinja template, or "auto" for the one that most of the models have; None keeps that of ``donor``.
        seed: of random masks.
        text: the recipe as the user wrote it.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    general: str | None = None
    parameters: dict[str, Setting] = field(default_factory=dict[str, Setting])
    variants: dict[str, str] = field(default_factory=dict[str, str])
    compat: str = "paper"
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    seed: int = 0
    text: str = ""

    @property
    def sliced(self) -> bool:
        """Whether the output is stacked from layers, instead of merged from whole models."""
        return any(entry.layers is not None for slice in self.slices for entry in slice.entries)

    @property
    def references(self) -> list[str]:
        """Every model of the recipe once, the base first."""
        named = [self.base, *(slice.base for slice in self.slices)]
        named += [entry.model for slice in self.slices for entry in slice.entries]
        return list(dict.fromkeys(name for name in [*named, self.general] if name is not None))

    @property
    def donor(self) -> str:
        """The model whose config and tokenizer the output gets: the base, or else the first."""
        return self.base or self.slices[0].entries[0].model


class Place(NamedTuple):
    """Where a parameter is evaluated: the tensor's name, and its layer's depth from 0 (first) to 1 (last)."""

    name: str
    depth: float


def resolve(setting: Setting, place: Place) -> Any:
    """The value of a setting at a place, a scalar; None if none of its filters matches.

    For example ``[{"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]`` gives 0.25 for an MLP at depth 0.25, else 0.5.
    """
    if is_table(setting):
        setting = [setting]
    if not is_list(setting):
        return setting
    if not any(is_table(item) for item in setting):
        return gradient(setting, place.depth)
    for item in setting:
        wanted = item.get("filter")
        if wanted is None or wanted == "*" or wanted in place.name:
            return resolve(item["value"], place)
    return None


def gradient(values: list[Any], depth: float) -> Any:
    """The value at a depth of values that are spaced evenly over it. Numbers are interpolated linearly, words and booleans
    change in steps."""
    if not all(is_number(value) for value in values):
        return values[int(depth * (len(values) - 1))]
    numbers = [float(value) for value in values]
    at = depth * (len(numbers) - 1)
    low = int(at)
    share = at - low
    return (1 - share) * numbers[low] + share * numbers[min(low + 1, len(numbers) - 1)]


def check_setting(key: str, setting: Setting, depth: int = 0) -> None:
    """Check that a setting has one of the forms that :func:`resolve` understands.

    Args:
        key: how an error names the setting.
        depth: how many tables and lists it is nested in.

    Raises:
        UserError: when it does not, or a number is not finite.
    """
    if is_table(setting):
        unknown = set(setting) - {"value", "filter"}
        if "value" not in setting or unknown or depth > 3:
            raise UserError(f"{key} must have a value and may have a filter, got {', '.join(map(str, setting)) or 'nothing'}")
        if not isinstance(setting.get("filter", ""), str | None):
            raise UserError(f"{key}.filter must be part of a tensor's name, got {setting['filter']!r}")
        check_setting(key, setting["value"], depth + 1)
    elif is_list(setting):
        kinds = {is_table(item) for item in setting}
        if not setting or len(kinds) > 1 or any(is_list(item) for item in setting):
            raise UserError(
                f"{key} must be a value, a list of values, or a list of tables of value and filter, got {setting!r}"
            )
        for item in setting:
            check_setting(key, item, depth + 1)
    elif not isinstance(setting, bool | int | float | str):
        raise UserError(f"{key} must be a number, a word, true or false, got {setting!r}")
    elif is_number(setting) and not math.isfinite(float(setting)):
        raise UserError(f"{key} must be finite, got {setting}")


def check_parameters(where: str, parameters: Any) -> dict[str, Setting]:
    """The table ``parameters``, after a check of every setting in it; {} for None. ``where`` names it in errors."""
    if parameters is None:
        return {}
    if not is_table(parameters) or not all(isinstance(key, str) for key in cast(dict[object, Any], parameters)):
        raise UserError(f"{where} must be a table, got {parameters!r}")
    for key, setting in parameters.items():
        check_setting(f"{where}.{key}", setting)
    return parameters


def check_dtype(key: str, value: Any) -> str | None:
    """The name of a floating point dtype, without "torch."; None for None.

    Raises:
        UserError: naming ``key``, for any other value.
    """
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise UserError(f"{key} must be one of {', '.join(DTYPES)}, got {value!r}")
    return name
