"""Lists the tensors of a recipe's output and where each one comes from, by name and layer. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from distmerge.errors import UserError
from distmerge.files.models import Model
from distmerge.merging.recipe import Recipe, Slice
from distmerge.theta.layers import has_rows_of_their_own, in_block, place_of, role_of


class Site(NamedTuple):
    """An output tensor's position in the recipe.

    Attributes:
        name: of the output tensor.
        slice: the slice of the recipe that makes it.
        names: the input tensor's name in each entry of the slice.
        depth: of its layer in the slice, from 0 (first) to 1 (last), at which gradients of parameters are evaluated; 0 for a
            tensor in no layer.
    """

    name: str
    slice: Slice
    names: tuple[str, ...]
    depth: float


def sites(recipe: Recipe, models: dict[str, Model]) -> Iterator[Site]:
    """Every output tensor's position in the recipe, in the output's order."""
    yield from stacked_layers(recipe, models) if recipe.sliced else whole_models(recipe, models)


def whole_models(recipe: Recipe, models: dict[str, Model]) -> Iterator[Site]:
    """The sites of a merge of whole models: every tensor keeps its name, and its depth is that in its own stack of layers."""
    (slice,) = recipe.slices
    donor = models[recipe.donor]
    counts: dict[str, int] = {}
    for name in donor.tensors:
        if place := place_of(name):
            counts[place.list] = max(counts.get(place.list, 0), place.index + 1)
    for reference in recipe.references:
        same_names(donor, models[reference])
    for name in donor.tensors:
        place = place_of(name)
        yield Site(name, slice, (name,) * len(slice.entries), depth_of(place.index, counts[place.list]) if place else 0.0)


def same_names(donor: Model, other: Model) -> None:
    """Refuse models whose tensors do not have the same names."""
    for one, two in ((donor, other), (other, donor)):
        for name in one.tensors:
            if name not in two.tensors:
                tied = "; are its embeddings tied?" if has_rows_of_their_own(name) else ""
                raise UserError(f"{two.reference} has no tensor {name}, which {one.reference} has{tied}")


def depth_of(index: int, count: int) -> float:
    """The depth of a layer among ``count`` layers, from 0 (first) to 1 (last, or only)."""
    return index / (count - 1) if count > 1 else 1.0


def stacked_layers(recipe: Recipe, models: dict[str, Model]) -> Iterator[Site]:
    """The sites of a model stacked from slices. Of the tensors in no layer, embeddings come from the first slice, the others
    (the final norm, the output layer) from the last."""
    stack, loose = layer_stack(models[recipe.donor])
    named = {entry.model for slice in recipe.slices for entry in slice.entries}
    stacks = {name: layer_stack(models[name])[0] for name in named}
    for name in loose:
        if role_of(name) == "embedding":
            yield Site(name, recipe.slices[0], (name,) * len(recipe.slices[0].entries), 0.0)
    out = 0
    for slice in recipe.slices:
        ranges = [entry.layers or (0, len(stack)) for entry in slice.entries]
        count = ranges[0][1] - ranges[0][0]
        for index in range(count):
            yield from one_layer(slice, [start + index for start, _ in ranges], out, depth_of(index, count), stacks)
            out += 1
    for name in loose:
        if role_of(name) != "embedding":
            yield Site(name, recipe.slices[-1], (name,) * len(recipe.slices[-1].entries), 0.0)


def layer_stack(model: Model) -> tuple[dict[int, list[str]], list[str]]:
    """The tensors' names in each layer, by the layer's index, and the names of those in no layer.

    Raises:
        UserError: when the model does not have exactly one stack of layers.
    """
    layers: dict[int, list[str]] = {}
    stacks: set[str] = set()
    for name in model.tensors:
        if place := place_of(name):
            stacks.add(place.list)
            layers.setdefault(place.index, []).append(name)
    if len(stacks) != 1:
        names = ", ".join(sorted(stacks)) or "none"
        raise UserError(f"slices need a model with one stack of layers, but {model.reference} has {names}")
    return layers, [name for name in model.tensors if place_of(name) is None]


def one_layer(
    slice: Slice, layers: list[int], out: int, depth: float, stacks: dict[str, dict[int, list[str]]]
) -> Iterator[Site]:
    """The sites of one output layer.

    Args:
        layers: the index of the input layer in each entry of the slice.
        out: the index of the output layer.
        stacks: by model, the tensors' names in each layer.
    """
    for entry, layer in zip(slice.entries, layers, strict=True):
        if layer not in stacks[entry.model]:
            raise UserError(f"{entry.model} has {len(stacks[entry.model])} layers, but the recipe asks for layer {layer}")
    for name in stacks[slice.entries[0].model][layers[0]]:
        yield Site(in_block(name, out), slice, tuple(in_block(name, layer) for layer in layers), depth)
