"""Pairs a recipe with its models: which input tensors make each output tensor, with which parameters. Imports no torch.

Names, shapes, dtypes and parameters are all checked here, before any tensor is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from distmerge.errors import UserError
from distmerge.files.adapters import Change
from distmerge.files.header import FLOATS, Stored
from distmerge.files.models import Model
from distmerge.merging.recipe import Entry, Place, Recipe, resolve
from distmerge.merging.sites import Site, sites
from distmerge.rules import catalogue
from distmerge.rules.parameters import PARAMETERS, REQUIRED, checked, half_width
from distmerge.theta.layers import place_of


class Input(NamedTuple):
    """One model's tensor in a merge.

    Attributes:
        model: the model's reference.
        factors: what an adapter changes in the tensor; None without one.
    """

    model: str
    name: str
    stored: Stored
    factors: Change | None = None


class Pairing(NamedTuple):
    """One tensor of the output and its inputs.

    Attributes:
        members: the inputs other than the base, in the recipe's order.
        base: the base's tensor; None for methods without a base, such as ``mean`` and ``passthrough``.
        shared: parameters of the tensor as a whole.
        each: parameters of each member.
        vocabulary: whether the rows are tokens.
        origin: the base's tensor where the recipe has a base that the method does not use; reports take task vectors from it.
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


def pair(recipe: Recipe, models: dict[str, Model]) -> list[Pairing]:
    """Every tensor of the output, in the order in which the first model stores them.

    Args:
        models: the models of all ``recipe.references``.

    Raises:
        UserError: naming the tensor and the model, or the parameter, that does not fit.
    """
    form = catalogue.entry(recipe.method)
    pairings = [pair_site(recipe, form, site, models) for site in sites(recipe, models)]
    if not pairings:
        raise UserError("the recipe's slices contain no tensors")
    return pairings


def check_structure(recipe: Recipe) -> None:
    """Check, before any model is opened, that the method gets the inputs it needs and only parameters that it has.

    Raises:
        UserError: naming what is missing, left over or unknown.
    """
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
            besides = "" if form.base == "none" else " besides the base"
            raise UserError(f"{recipe.method} takes {count} models{besides}, got {len(others)}")
        if len({entry.model for entry in slice.entries}) < len(slice.entries) and form.base != "none":
            raise UserError(f"{recipe.method} takes each model only once")
        for where, table in [("parameters", slice.parameters), *((entry.model, entry.parameters) for entry in slice.entries)]:
            check_known(recipe.method, form, where, table)
    if recipe.general is not None and form.first != "general":
        raise UserError(f"general is only for the method ptm, got method {recipe.method}")
    check_known(recipe.method, form, "parameters", recipe.parameters)


def check_known(name: str, form: catalogue.Entry, where: str, table: dict[str, Any]) -> None:
    """Refuse parameters in ``table`` that the method ``name`` does not have. ``where`` names the table in the error."""
    for key in table:
        if key in form.parameters:
            continue
        users = [other for other in catalogue.names() if key in catalogue.entry(other).parameters]
        hint = f"; it belongs to {', '.join(users)}" if users else ""
        raise UserError(f"{where}: {name} has no parameter {key}{hint}; it takes {', '.join(form.parameters) or 'none'}")


def pair_site(recipe: Recipe, form: catalogue.Entry, site: Site, models: dict[str, Model]) -> Pairing:
    """The pairing of a site, after a check of its tensors' shapes and its parameters."""
    base, origin = site.slice.base or recipe.base, None
    entries = list(zip(site.slice.entries, site.names, strict=True))
    inputs = {entry.model: input_of(models[entry.model], name) for entry, name in entries}
    if base is not None and form.base != "none":
        origin = inputs[base] if base in inputs else input_of(models[base], site.name)
    members = [(entry, input_of(models[entry.model], name)) for entry, name in entries if origin is None or entry.model != base]
    if form.first == "general":
        assert recipe.general is not None
        skills = [item for item in members if item[0].model != recipe.general]
        members = [(Entry(recipe.general, {"omega": 0.0}), input_of(models[recipe.general], site.name)), *skills]
    everything = [*([origin] if origin else []), *(item for _, item in members)]
    vocabulary = is_vocabulary(everything, models)
    same_shapes(everything, recipe.tokenizer is not None and vocabulary)
    shared, each = parameters(recipe, form, site, [entry for entry, _ in members], [item.name for _, item in members])
    check_values(recipe, form, site.name, shared, each)
    shape, unused = everything[0].stored.shape, None
    if origin is None and base is not None and site.name in models[base].tensors:
        unused = input_of(models[base], site.name)
    inputs_of = tuple(item for _, item in members)
    return Pairing(site.name, shape, inputs_of, origin, shared, each, vocabulary, unused)


def check_values(
    recipe: Recipe, form: catalogue.Entry, name: str, shared: dict[str, Any], each: tuple[dict[str, Any], ...]
) -> None:
    """Refuse parameters that are valid one by one, but not together."""
    if not form.elect and "weight" in form.parameters:
        total = sum(one["weight"] for one in each)
        if catalogue.divisor(recipe.method, recipe.compat, recipe.variants, shared) == "weights" and abs(total) < 1e-8:
            raise UserError(f"the weights of {name} sum to {total}, which cannot be normalised")
    for one in each if form.sparsify == "magprune" else ():
        half = half_width(catalogue.variants(recipe.method, recipe.compat, recipe.variants), one["epsilon"])
        if one["density"] < 1 and not (one["density"] - half > 0 and one["density"] + half < 1):
            raise UserError(f"epsilon must keep density +- {half:g} inside (0, 1) at {name}, but density is {one['density']:g}")


def input_of(model: Model, name: str) -> Input:
    """A model's tensor as an input.

    Raises:
        UserError: when the model does not have it.
    """
    if name not in model.tensors:
        raise UserError(f"{model.reference} has no tensor {name}")
    return Input(model.reference, name, model.tensors[name], model.factors.get(name))


def is_vocabulary(inputs: list[Input], models: dict[str, Model]) -> bool:
    """Whether a tensor's rows are tokens: it is in no layer, and has as many rows as config.json's vocab_size says."""
    return all(
        place_of(item.name) is None
        and len(item.stored.shape) > 0
        and item.stored.shape[0] == models[item.model].config.get("vocab_size")
        for item in inputs
    )


def same_shapes(inputs: list[Input], rows_differ: bool) -> None:
    """Refuse inputs of different shapes, or of which only some are floating point.

    Args:
        rows_differ: allow different numbers of rows, which will be aligned.
    """
    first = inputs[0]
    for other in inputs[1:]:
        skip = 1 if rows_differ else 0
        if other.stored.shape[skip:] != first.stored.shape[skip:]:
            rows = first.stored.shape[1:] == other.stored.shape[1:] and len(first.stored.shape) > 0
            hint = "; set tokenizer_source to align the vocabularies" if rows else ""
            raise UserError(
                f"{other.name} has shape {list(other.stored.shape)} in {other.model}, "
                f"but {list(first.stored.shape)} in {first.model}{hint}"
            )
        if (other.stored.dtype in FLOATS) != (first.stored.dtype in FLOATS):
            raise UserError(f"{other.name} is {other.stored.dtype} in {other.model}, but {first.stored.dtype} in {first.model}")


def parameters(
    recipe: Recipe, form: catalogue.Entry, site: Site, entries: list[Entry], names: list[str]
) -> tuple[dict[str, Any], tuple[dict[str, Any], ...]]:
    """The parameters at a site: those of the tensor as a whole, and those of each member.

    Args:
        entries, names: of each member, the recipe's entry and the input tensor's name.
    """
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
    """The value of a parameter: from the first table that has the key, with a filter that matches the place; else the default.

    Args:
        where: how an error names the place.
    """
    for table in tables:
        if key in table:
            value = resolve(table[key], place)
            if value is not None:
                return checked(key, value, where)
    default = form.default(key)
    if default is REQUIRED:
        raise UserError(f"{key} must be given for {where}")
    return default
