"""The configuration of a model that is stacked from layers of other models, and a check that transformers can load it.

A configuration describes layers by their index: which ones use sliding attention, have no rotary embedding, or hold experts.
These entries move with their layers. Where that is not enough, building the model with transformers fails, before anything is
written.
"""

from __future__ import annotations

import os
from typing import Any, cast

from distmerge.errors import UserError
from distmerge.files.header import FLOATS
from distmerge.files.models import Model
from distmerge.merging.json_types import is_list
from distmerge.merging.pairing import Pairing
from distmerge.merging.recipe import Recipe
from distmerge.theta.layers import place_of

COUNTS = ("num_hidden_layers", "n_layer", "num_layers")
INDEX_LISTS = ("moe_layers", "mlp_only_layers", "full_attn_idxs", "attn_layer_indices", "hybrid_layer_ids")
"""Keys whose lists hold indices of layers, instead of one value per layer."""

CHECKED_LAYERS = 128
"""How many layers the check builds at most: more than common models have, and still built in a second."""


def restacked(recipe: Recipe, models: dict[str, Model], config: dict[str, Any]) -> dict[str, Any]:
    """The donor's configuration with every list over the layers assembled from the models that the layers come from.

    Raises:
        UserError: when the configuration has no number of layers, or a layer's model lacks a list that the donor has.
    """
    count = next((key for key in COUNTS if key in config), None)
    if count is None:
        raise UserError("slices need a config.json with num_hidden_layers, which the first model does not have")
    layers = [
        (entry.model, index)
        for slice in recipe.slices
        for entry in slice.entries[:1]
        for index in range(*entry.layers or (0, 0))
    ]
    whole = {name: complete(models[name].config) for name in dict.fromkeys([recipe.donor, *(name for name, _ in layers)])}
    return stacked(whole, recipe.donor, config | {count: len(layers)}, layers)


def stacked(whole: dict[str, dict[str, Any]], donor: str, out: dict[str, Any], layers: list[tuple[str, int]]) -> dict[str, Any]:
    """``out`` with its lists over the layers replaced.

    Args:
        whole: the complete configuration of each model, by its reference.
        layers: the model and the layer's index there, for each layer of the output.

    For example, with layers 0, 1, 1, 2 of a model, ``layer_types: [a, b, c]`` becomes ``[a, b, b, c]``, and the indices
    ``moe_layers: [1]`` become ``[1, 2]``.
    """
    for key, value in whole[donor].items():
        if not is_list(value):
            continue
        if key in INDEX_LISTS:
            out[key] = [place for place, (name, index) in enumerate(layers) if index in (whole[name].get(key) or ())]
        elif is_per_layer(key, value, count_of(whole[donor])):
            out[key] = [of_layer(key, whole[name].get(key), name, index) for name, index in layers]
    return out


def count_of(config: dict[str, Any]) -> Any:
    """The number of layers; None where the configuration has none."""
    return next((config[key] for key in COUNTS if key in config), None)


def beginning(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The configuration of a model that has only the first ``layers`` layers."""
    held = {key: value for key, value in config.items() if is_list(value)}
    cut = {key: value[:layers] for key, value in held.items() if is_per_layer(key, value, count_of(config))}
    cut |= {key: [index for index in held[key] if index < layers] for key in INDEX_LISTS if key in held}
    return config | cut | {key: layers for key in COUNTS if key in config}


def is_per_layer(key: str, value: list[Any], layers: Any) -> bool:
    """Whether a list has a value for each layer. A list of tokens is not one, even if it has as many items as a small model has
    layers."""
    return len(value) == layers and "token" not in key and key != "architectures"


def of_layer(key: str, values: Any, model: str, index: int) -> Any:
    if not is_list(values) or index >= len(values):
        raise UserError(f"the config.json of {model} must have {key} for layer {index}, since the first model's has it")
    return values[index]


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with transformers' defaults for missing keys: Gemma's layer_types, for one, follow from the index."""
    if not is_known(config):
        return config
    return config | {key: value for key, value in parsed(config).to_dict().items() if config.get(key) is None}


def within(name: str, layers: int) -> bool:
    """Whether a tensor lies in the first ``layers`` layers, or in none."""
    place = place_of(name)
    return place is None or place.index < layers


def is_known(config: dict[str, Any]) -> bool:
    """Whether transformers itself implements this architecture."""
    if "model_type" not in config:
        return False
    from transformers import CONFIG_MAPPING

    return config["model_type"] in CONFIG_MAPPING


def parsed(config: dict[str, Any]) -> Any:
    """The configuration as transformers' own object.

    Raises:
        UserError: when transformers rejects it.
    """
    from transformers import CONFIG_MAPPING

    from distmerge.model import first_line

    try:
        return cast(Any, CONFIG_MAPPING[config["model_type"]]).from_dict(dict(config))
    except Exception as error:  # each architecture checks its keys in its own way
        raise UserError(f"the config.json of {config['model_type']} is not valid: {first_line(error)}") from None


def check_loads(config: dict[str, Any], pairings: list[Pairing]) -> None:
    """Check that a model with this configuration has exactly the tensors that are about to be written.

    The model is built on the meta device, without memory for its parameters. Architectures that transformers does not
    implement itself are not checked.

    Raises:
        UserError: naming the first tensor that is missing, left over or of another shape.
    """
    if not is_known(config):
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers imports deepspeed, which would print the device it found
    import torch
    import transformers

    from distmerge.model import first_line

    built = parsed(config)
    if count_of(config) > CHECKED_LAYERS:
        built = parsed(beginning(config, CHECKED_LAYERS))
        pairings = [item for item in pairings if within(item.name, CHECKED_LAYERS)]
    named = getattr(transformers, str((config.get("architectures") or [""])[0]), None)
    kind: Any = named if hasattr(named, "from_pretrained") else transformers.AutoModelForCausalLM
    kinds = {True: torch.float32, False: torch.int64}
    tensors = {
        item.name: torch.empty(item.shape, dtype=kinds[item.members[0].stored.dtype in FLOATS], device="meta")
        for item in pairings
    }
    try:
        _, report = kind.from_pretrained(
            None, config=built, state_dict=tensors, device_map="meta", dtype=torch.float32, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:  # architectures raise many kinds of errors for layers that they cannot build
        raise UserError(f"the slices do not make a {config['model_type']} model: {first_line(error)}") from None
    for key, problem in (
        ("missing_keys", "it lacks"),
        ("unexpected_keys", "it has no place for"),
        ("mismatched_keys", "it needs another shape of"),
    ):
        if report[key]:
            name = min(entry if isinstance(entry, str) else entry[0] for entry in report[key])
            more = f" and {len(report[key]) - 1} more" if len(report[key]) > 1 else ""
            raise UserError(f"the slices do not make a {config['model_type']} model: {problem} {name}{more}")
