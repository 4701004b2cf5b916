"""Opens the models that a recipe names: directories, other trainers' checkpoints, and LoRA adapters applied to their base."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from distmerge.errors import UserError
from distmerge.files.adapter_fit import with_adapter
from distmerge.files.adapters import is_adapter, read_adapter
from distmerge.files.convert import as_safetensors, is_foreign
from distmerge.files.models import Model, open_model
from distmerge.merging.recipe import Recipe


def open_all(recipe: Recipe, allow_pickle: bool) -> dict[str, Model]:
    """Open every model of the recipe, by its reference.

    The reference "BASE+ADAPTER" means BASE with the adapter applied; an adapter alone is applied to the recipe's base.

    Raises:
        UserError: when a model is missing or malformed, or an adapter has no base or does not fit it.
    """
    models: dict[str, Model] = {}
    for reference in recipe.references:
        whole, plus, adapter = reference.rpartition("+")
        if plus and not Path(reference).exists():
            models[reference] = adapted(open_any(whole, allow_pickle), reference, Path(adapter))
        elif is_adapter(Path(reference)):
            if recipe.base is None or reference == recipe.base:
                raise UserError(f"{reference} is an adapter, which needs a base: write it as BASE+{reference}")
            models[reference] = adapted(models[recipe.base], reference, Path(reference))
        else:
            models[reference] = open_any(reference, allow_pickle)
    return models


def open_any(reference: str, allow_pickle: bool) -> Model:
    """Open a model's directory or hub id, or a DCP or DeepSpeed checkpoint, which is converted in a directory beside it."""
    path = Path(reference).expanduser()
    if path.is_dir() and is_foreign(path):
        return replace(open_model(str(as_safetensors(path, allow_pickle))), reference=reference)
    return open_model(reference, allow_pickle)


def adapted(base: Model, reference: str, adapter: Path) -> Model:
    if not is_adapter(adapter):
        raise UserError(f"{adapter} is not a LoRA adapter: it has no adapter_config.json")
    return replace(with_adapter(base, reference, read_adapter(adapter)), adapter=adapter)
