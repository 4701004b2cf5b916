"""Pairs a recipe with its models: which input tensors make each output tensor, with which parameters. Imports no torch.

Everything that can be known to fail is refused here, before any tensor is read: names, shapes, dtypes, parameters.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from distmerge.errors import UserError
from distmerge.files.adapters import Change
from distmerge.files.header import FLOATS, Stored
from distmerge.files.models import Model
from distmerge.merging.recipe import Entry, Place, Recipe, Slice, resolve
from distmerge.rules import catalogue
from distmerge.rules.parameters import PARAMETERS, REQUIRED, checked, half_width
from distmerge.theta.layers import has_rows_of_their_own, in_block, place_of, role_of


class Input(NamedTuple):
    """One model's tensor in a merge, with what an adapter changes of it, if there is one."""

    model: str
    name: str
    stored: Stored
    factors: Change | None = None


class Pairing(NamedTuple):
    """One tensor of the output.

    Attributes:
        members: the inputs beside the base, in the recipe's order (for ``mean`` and ``passthrough`` there is no base).
        base: the base's tensor, or None.
        shared: parameters of the tensor.
        each: parameters of each member.
        vocabulary: whether the rows are tokens.
        origin: the base's tensor where the method has no use for a base: reports start from it.
    """

    name: str
    shape: tuple[int, ...]
    members: tuple[Input, ...]
    base: Input | None
    shared: dict[str, Any]
    each: tuple[dict[str, Any], ...]
    vocabulary: bool = False
    origin: Input | None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        return self.members if self.base is None else (self.base, *self.members)


class Site(NamedTuple):
    """Where an output tensor is made: its name, the slice, each entry's name for it, and its depth in the slice."""

    name: str
    slice: Slice
    names: tuple[str, ...]
    depth: float


def pair(recipe: Recipe, models: dict[str, Model]) -> list[Pairing]:
    """Every tensor of the output, in the order in which the first model stores them.

    Args:
        models: all of ``recipe.references``.

    Raises:
        UserError: naming the tensor and the model, or the parameter.
    """
    form = catalogue.entry(recipe.method)
    pairings = [joined(recipe, form, site, models) for site in sites(recipe, models)]
    if not pairings:
        raise UserError("the recipe's slices hold no tensors")
    return pairings


def check_structure(recipe: Recipe) -> None:
    """Check, before any model is opened, that the method gets the inputs that it needs and only parameters that it has."""
    form = catalogue.entry(recipe.method)
    if form.by_tokens:
        catalogue.check(recipe.method, "method")
    catalogue.variants(recipe.method, recipe.compat, recipe.variants)
    for slice in recipe.slices:
        base = slice.base or recipe.base
        if form.base == "needed" and base is None:
            raise UserError(f"{recipe.method} needs a base: the model that the others were trained from")
        others = [entry for entry in slice.entries if form.base == "none" or entry.model != base]
        low, high = form.beside
        if form.first == "general":
            if recipe.general is None:
                raise UserError(f"{recipe.method} needs general: the model to which the skills are added")
            others = [entry for entry in others if entry.model != recipe.general]
        if len(others) < low or (high is not None and len(others) > high):
            count = str(low) if low == high else f"at least {low}"
            beside = "" if form.base == "none" else " beside the base"
            raise UserError(f"{recipe.method} takes {count} models{beside}, got {len(others)}")
        if len({entry.model for entry in slice.entries}) < len(slice.entries) and form.base != "none":
            raise UserError(f"{recipe.method} takes each model once")
        for where, table in [("parameters", slice.parameters), *((entry.model, entry.parameters) for entry in slice.entries)]:
            check_known(recipe.method, form, where, table)
    if recipe.general is not None and form.first != "general":
        raise UserError(f"general is for ptm alone, got method {recipe.method}")
    check_known(recipe.method, form, "parameters", recipe.parameters)


def check_known(name: str, form: catalogue.Entry, where: str, table: dict[str, Any]) -> None:
    for key in table:
        if key in form.parameters:
            continue
        users = [other for other in catalogue.names() if key in catalogue.entry(other).parameters]
        hint = f"; it belongs to {', '.join(users)}" if users else ""
        raise UserError(f"{where}: {name} has no parameter {key}{hint}; it takes {', '.join(form.parameters) or 'none'}")


def sites(recipe: Recipe, models: dict[str, Model]) -> Iterator[Site]:
    yield from stacked_layers(recipe, models) if recipe.sliced else whole_models(recipe, models)


def whole_models(recipe: Recipe, models: dict[str, Model]) -> Iterator[Site]:
    """Every tensor under its own name. Depth counts the layers of its own stack."""
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
    """Refuse models that do not hold the same tensors."""
    for one, two in ((donor, other), (other, donor)):
        for name in one.tensors:
            if name not in two.tensors:
                tied = "; are its embeddings tied?" if has_rows_of_their_own(name) else ""
                raise UserError(f"{two.reference} has no tensor {name}, which {one.reference} has{tied}")


def depth_of(index: int, count: int) -> float:
    return index / (count - 1) if count > 1 else 1.0


def stacked_layers(recipe: Recipe, models: dict[str, Model]) -> Iterator[Site]:
    """Stacked layers. Tensors before the layers come from the first slice, tensors behind them from the last."""
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
    """The names of each layer of the model's one stack, and of what is in no layer."""
    layers: dict[int, list[str]] = {}
    stacks: set[str] = set()
    for name in model.tensors:
        if place := place_of(name):
            stacks.add(place.list)
            layers.setdefault(place.index, []).append(name)
    if len(stacks) != 1:
        names = ", ".join(sorted(stacks)) or "none"
        raise UserError(f"slices need a model with one stack of layers, {model.reference} has {names}")
    return layers, [name for name in model.tensors if place_of(name) is None]


def one_layer(
    slice: Slice, layers: list[int], out: int, depth: float, stacks: dict[str, dict[int, list[str]]]
) -> Iterator[Site]:
    """The sites of one output layer; ``stacks`` are the names in each model's layers."""
    for entry, layer in zip(slice.entries, layers, strict=True):
        if layer not in stacks[entry.model]:
            raise UserError(f"{entry.model} has {len(stacks[entry.model])} layers, the recipe asks for layer {layer}")
    for name in stacks[slice.entries[0].model][layers[0]]:
        yield Site(in_block(name, out), slice, tuple(in_block(name, layer) for layer in layers), depth)


def joined(recipe: Recipe, form: catalogue.Entry, site: Site, models: dict[str, Model]) -> Pairing:
    """The pairing of a site, after its tensors' shapes have been compared."""
    base, origin = site.slice.base or recipe.base, None
    entries = list(zip(site.slice.entries, site.names, strict=True))
    inputs = {entry.model: take(models[entry.model], name) for entry, name in entries}
    if base is not None and form.base != "none":
        origin = inputs[base] if base in inputs else take(models[base], site.name)
    members = [(entry, take(models[entry.model], name)) for entry, name in entries if origin is None or entry.model != base]
    if form.first == "general":
        assert recipe.general is not None
        skills = [item for item in members if item[0].model != recipe.general]
        members = [(Entry(recipe.general, {"omega": 0.0}), take(models[recipe.general], site.name)), *skills]
    everything = [*([origin] if origin else []), *(item for _, item in members)]
    vocabulary = is_vocabulary(everything, models)
    same_shapes(everything, recipe.tokenizer is not None and vocabulary)
    shared, each = parameters(recipe, form, site, [entry for entry, _ in members], [item.name for _, item in members])
    check_values(recipe, form, site.name, shared, each)
    shape, unused = everything[0].stored.shape, None
    if origin is None and base is not None and site.name in models[base].tensors:
        unused = take(models[base], site.name)
    inputs_of = tuple(item for _, item in members)
    return Pairing(site.name, shape, inputs_of, origin, shared, each, vocabulary, unused)


def check_values(
    recipe: Recipe, form: catalogue.Entry, name: str, shared: dict[str, Any], each: tuple[dict[str, Any], ...]
) -> None:
    """Refuse parameters that are sound alone, but not together."""
    if not form.elect and "weight" in form.parameters:
        total = sum(one["weight"] for one in each)
        if catalogue.divisor(recipe.method, recipe.compat, recipe.variants, shared) == "weights" and abs(total) < 1e-8:
            raise UserError(f"the weights of {name} sum to {total}, which cannot be normalised")
    for one in each if form.sparsify == "magprune" else ():
        half = half_width(catalogue.variants(recipe.method, recipe.compat, recipe.variants), one["epsilon"])
        if one["density"] < 1 and not (one["density"] - half > 0 and one["density"] + half < 1):
            raise UserError(f"epsilon must keep density +- {half:g} inside (0, 1) at {name}, density is {one['density']:g}")


def take(model: Model, name: str) -> Input:
    if name not in model.tensors:
        raise UserError(f"{model.reference} has no tensor {name}")
    return Input(model.reference, name, model.tensors[name], model.factors.get(name))


def is_vocabulary(inputs: list[Input], models: dict[str, Model]) -> bool:
    """Whether a tensor's rows are tokens: it is in no layer and has as many rows as the model's config has tokens."""
    return all(
        place_of(item.name) is None
        and len(item.stored.shape) > 0
        and item.stored.shape[0] == models[item.model].config.get("vocab_size")
        for item in inputs
    )


def same_shapes(inputs: list[Input], rows_differ: bool) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        skip = 1 if rows_differ else 0
        if other.stored.shape[skip:] != first.stored.shape[skip:]:
            rows = first.stored.shape[1:] == other.stored.shape[1:] and len(first.stored.shape) > 0
            hint = "; a tokenizer_source would align vocabularies" if rows else ""
            raise UserError(
                f"{other.name} has shape {list(other.stored.shape)} in {other.model}, "
                f"but {list(first.stored.shape)} in {first.model}{hint}"
            )
        if (other.stored.dtype in FLOATS) != (first.stored.dtype in FLOATS):
            raise UserError(f"{other.name} is {other.stored.dtype} in {other.model}, but {first.stored.dtype} in {first.model}")


def parameters(
    recipe: Recipe, form: catalogue.Entry, site: Site, entries: list[Entry], names: list[str]
) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """All parameters at the site: the shared ones, and those of each member."""
    tables = (site.slice.parameters, recipe.parameters)
    shared = {
        key: value_of(key, form, tables, Place(site.name, site.depth), site.name)
        for key in form.parameters
        if not PARAMETERS[key].each
    }
    each = tuple(
        {
            key: value_of(key, form, (entry.parameters, *tables), Place(name, site.depth), f"{entry.model} at {name}")
            for key in form.parameters
            if PARAMETERS[key].each
        }
        for entry, name in zip(entries, names, strict=True)
    )
    return shared, each


def value_of(key: str, form: catalogue.Entry, tables: tuple[dict[str, Any], ...], place: Place, where: str) -> Any:
    """The value of a parameter: that of the first table which has the key with a filter that matches."""
    for table in tables:
        if key in table:
            value = resolve(table[key], place)
            if value is not None:
                return checked(key, value, where)
    default = form.default(key)
    if default is REQUIRED:
        raise UserError(f"{key} must be given for {where}")
    return default
