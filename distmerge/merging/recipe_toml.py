"""Reads distmerge's own recipes, in TOML. For example:

method = "ties"
base = "models/base"
density = 0.5                    # any parameter: a value, a list (over the layers), or [{filter = "mlp", value = 1}, ...]
trim = "tensor"                  # a variant; those that are not set follow from compat
plugins = ["my_module"]          # modules that define rules of your own, see distmerge.rules.custom
[[model]]
path = "models/code"
weight = 0.5
"""

from __future__ import annotations

import tomllib
from typing import Any

from distmerge.errors import UserError
from distmerge.merging.json_types import is_list, is_table
from distmerge.merging.recipe import Entry, Recipe, Slice, Tokenizer, check_dtype, check_parameters
from distmerge.rules import catalogue
from distmerge.rules.parameters import PARAMETERS, VARIANTS, is_variant
from distmerge.rules.plugins import load_plugins

KEYS = (
    "method", "base", "general", "compat", "dtype", "out_dtype", "tokenizer", "chat_template", "seed", "model", "plugins",
)  # fmt: skip


def parse(text: str) -> Recipe:
    """The recipe in a text of TOML.

    Raises:
        UserError: when it is not valid TOML, or for the first key or value that is not supported.
    """
    try:
        table = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"the recipe is not valid TOML: {error}") from None
    return from_table(table, text)


def from_table(table: dict[str, Any], text: str) -> Recipe:
    """The recipe in a table of the notation's keys.

    Args:
        text: as the user wrote it; "" where the table was made from flags.
    """
    plugins = table.get("plugins", [])
    if not is_list(plugins) or not all(isinstance(module, str) for module in plugins):
        raise UserError(f"plugins must be a list of modules, got {plugins!r}")
    load_plugins(plugins)
    method = table.get("method")
    if isinstance(method, str):
        catalogue.is_known(method)  # loads a rule of an installed package, which can add parameters
    for key in table:
        if key not in (*KEYS, *PARAMETERS, *VARIANTS):
            raise UserError(f"{key} is not a key of a recipe; known: {', '.join((*KEYS, *PARAMETERS, *VARIANTS))}")
    models = table.get("model")
    if not is_list(models) or not models or not all(is_table(item) for item in models):
        raise UserError("a recipe must have at least one [[model]] with a path")
    compat, seed = table.get("compat", "paper"), table.get("seed", 0)
    if not isinstance(method, str):
        raise UserError(f"method must be the name of a method, got {method!r}")
    if compat not in ("paper", "mergekit"):
        raise UserError(f'compat must be "paper" or "mergekit", got {compat!r}')
    if type(seed) is not int:
        raise UserError(f"seed must be a whole number, got {seed!r}")
    words = {key: str(table[key]) for key in VARIANTS if key in table and is_variant(key, table[key])}
    shared = {key: table[key] for key in PARAMETERS if key in table and key not in words}
    entries = tuple(read_model(item, index) for index, item in enumerate(models))
    return Recipe(
        method=catalogue.canonical(method), slices=(Slice(entries),),
        base=text_of(table, "base"), general=text_of(table, "general"), parameters=check_parameters("recipe", shared),
        variants=words, compat=compat,
        dtype=check_dtype("dtype", table.get("dtype")), out_dtype=check_dtype("out_dtype", table.get("out_dtype")),
        tokenizer=Tokenizer(str(table["tokenizer"])) if "tokenizer" in table else None,
        chat_template=text_of(table, "chat_template"), seed=seed, text=text,
    )  # fmt: skip


def read_model(item: dict[str, Any], index: int) -> Entry:
    """The ``index``-th [[model]]."""
    where = f"model[{index}]"
    for key in item:
        if key not in ("path", *PARAMETERS):
            raise UserError(f"{where}.{key} is not a known key; known: path, {', '.join(PARAMETERS)}")
    if not isinstance(item.get("path"), str) or not item["path"]:
        raise UserError(f"{where}.path must be a model directory or a hub id, got {item.get('path')!r}")
    own = check_parameters(where, {key: value for key, value in item.items() if key != "path"})
    return Entry(item["path"], own)


def text_of(table: dict[str, Any], key: str) -> str | None:
    value = table.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key} must be a string, got {value!r}")
    return value
