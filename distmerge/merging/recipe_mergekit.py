"""Reads mergekit's YAML recipes unchanged. Keys that are not supported are an error that names them; none is ignored.

Format: https://github.com/arcee-ai/mergekit/blob/main/docs/merge_methods.md and mergekit's README.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from distmerge.errors import UserError
from distmerge.merging.json_types import Json, is_list, is_table
from distmerge.merging.recipe import Entry, Recipe, Slice, Tokenizer, check_dtype, check_parameters
from distmerge.rules import catalogue

KEYS = (
    "models", "slices", "merge_method", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "chat_template",
)  # fmt: skip
REFUSED = {
    "modules": "models of several modules are not supported; merge each module's directory separately",
    "name": "several recipes in one file are not supported; write one file each",
}


def parse(text: str) -> Recipe:
    """The recipe in a text of mergekit's YAML.

    Raises:
        UserError: when it is not valid YAML, or for the first key or value that is not supported.
    """
    import yaml

    try:
        documents = list(yaml.safe_load_all(text))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise UserError(f"the recipe is not valid YAML: {' '.join(str(error).split())[:200]}") from None
    if len(documents) > 1:
        raise UserError("several recipes in one file are not supported; write one file each")
    try:
        return from_table(documents[0] if documents else None, text)
    except RecursionError:
        raise UserError("the recipe must not refer to itself by YAML aliases") from None


def from_table(table: Any, text: str) -> Recipe:
    """The recipe in the parsed YAML document ``table``, whose text is ``text``."""
    known(table, "recipe", KEYS)
    if not isinstance(table.get("merge_method"), str):
        raise UserError(f"merge_method must be the name of a method, got {table.get('merge_method')!r}")
    if bool(table.get("models")) == bool(table.get("slices")):
        raise UserError("a recipe must have either models or slices")
    if table.get("models"):
        slices = (Slice(tuple(entry(item, f"models[{i}]", False) for i, item in listed(table, "models"))),)
    else:
        slices = tuple(read_slice(item, f"slices[{i}]") for i, item in listed(table, "slices"))
    if table.get("tokenizer_source") and table.get("tokenizer"):
        raise UserError("a recipe must have only one of tokenizer_source and tokenizer")
    template = table.get("chat_template")
    if template is not None and not isinstance(template, str):
        raise UserError(f"chat_template must be a string, got {template!r}")
    return Recipe(
        method=catalogue.canonical(table["merge_method"]), slices=slices,
        base=reference(table.get("base_model"), "base_model", optional=True),
        parameters=check_parameters("parameters", table.get("parameters")), compat="mergekit",
        dtype=check_dtype("dtype", table.get("dtype")), out_dtype=check_dtype("out_dtype", table.get("out_dtype")),
        tokenizer=read_tokenizer(table), chat_template=template, text=text,
    )  # fmt: skip


def listed(table: dict[str, Any], key: str) -> Iterable[tuple[int, Json]]:
    """The items of the list at ``key``, which must have some, with their indices."""
    value = table[key]
    if not is_list(value) or not value:
        raise UserError(f"{key} must be a list that is not empty, got {value!r}"[:200])
    return enumerate(value)


def known(table: Json, where: str, keys: tuple[str, ...]) -> None:
    """Refuse a value that is not a table, or has a key that is not among ``keys``."""
    if not is_table(table):
        raise UserError(f"{where} must be a table, got {str(table)[:80]!r}")
    for key in table:
        if key in REFUSED:
            raise UserError(f"{where}.{key}: {REFUSED[key]}")
        if key not in keys:
            raise UserError(f"{where}.{key} is not supported; known: {', '.join(keys)}")


def entry(item: Any, where: str, sliced: bool) -> Entry:
    """One of ``models`` or, ``sliced``, of the ``sources`` of a slice."""
    known(item, where, ("model", "parameters", "layer_range") if sliced else ("model", "parameters"))
    parameters = check_parameters(f"{where}.parameters", item.get("parameters"))
    model = reference(item.get("model"), f"{where}.model")
    assert model is not None
    return Entry(model, parameters, layer_range(item.get("layer_range"), where) if sliced else None)


def layer_range(value: Json, where: str) -> tuple[int, int]:
    whole = is_list(value) and len(value) == 2 and all(type(item) is int for item in value)
    if not whole or not 0 <= value[0] < value[1]:
        raise UserError(f"{where}.layer_range must be [first, stop] with 0 <= first < stop, got {value!r}")
    return value[0], value[1]


def read_slice(item: Any, where: str) -> Slice:
    known(item, where, ("sources", "base_model", "parameters"))
    if not item.get("sources"):
        raise UserError(f"{where}.sources must be a list of models and layer ranges, got nothing")
    entries = tuple(entry(source, f"{where}.sources[{i}]", True) for i, source in listed(item, "sources"))
    if len({layers[1] - layers[0] for layers in (source.layers for source in entries) if layers}) > 1:
        raise UserError(f"{where}: the layer_range of all sources must have the same number of layers")
    base = reference(item.get("base_model"), f"{where}.base_model", optional=True)
    return Slice(entries, base, check_parameters(f"{where}.parameters", item.get("parameters")))


def reference(value: Any, where: str, optional: bool = False) -> str | None:
    """A model's reference, which is a string, or mergekit's table of model.path, model.revision and lora.path.

    Args:
        optional: return None for None, instead of an error.
    """
    if value is None and optional:
        return None
    if is_table(value):
        known(value, where, ("model", "lora"))
        model, lora = (located(value.get(key), f"{where}.{key}") for key in ("model", "lora"))
        value = f"{model}+{lora}" if model and lora else model
    if not isinstance(value, str) or not value or not value.isprintable():
        raise UserError(f"{where} must be a model directory or a hub id, got {value!r}")
    return value


def located(value: Any, where: str) -> str | None:
    """``path@revision`` of mergekit's table of path and revision; any other value as it is."""
    if not is_table(value):
        return value
    known(value, where, ("path", "revision"))
    return f"{value.get('path')}@{value['revision']}" if value.get("revision") else value.get("path")


def read_tokenizer(table: dict[str, Any]) -> Tokenizer | None:
    """What ``tokenizer_source`` or the section ``tokenizer`` chooses; None without either."""
    if table.get("tokenizer_source") is not None:
        source = reference(table["tokenizer_source"], "tokenizer_source")
        assert source is not None
        return Tokenizer(source)
    section = table.get("tokenizer")
    if section is None:
        return None
    known(section, "tokenizer", ("source", "pad_to_multiple_of", "tokens"))
    if section.get("tokens"):
        raise UserError("tokenizer.tokens is not supported: the embeddings of single tokens cannot be chosen")
    if (section.get("pad_to_multiple_of") or 1) != 1:
        raise UserError("tokenizer.pad_to_multiple_of is not supported: the vocabulary has one row for each token")
    source = reference(section.get("source", "union"), "tokenizer.source")
    assert source is not None
    return Tokenizer(source)
