"""The records in a merged model's directory (merge.json, the model card, config.json), and the check that it is unchanged.

Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.files.models import TOKENIZER_FILES, Model, read_json
from distmerge.files.output import RECORD
from distmerge.merging.json_types import is_table
from distmerge.merging.recipe import Recipe
from distmerge.rules import catalogue

Hashes = dict[str, dict[str, Any]]
"""By file name or path, each file's "bytes", "sha256" and perhaps "xxh128"."""

FORM = 3
"""The version of the arithmetic, raised whenever a recipe gives other bytes than before (random masks, the order of sums). A
merge that was interrupted with another version starts from scratch."""


def describe(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a JSON object: all that the output's bytes depend on, other than the inputs."""
    return {
        "method": recipe.method,
        "compat": recipe.compat,
        "variants": catalogue.variants(recipe.method, recipe.compat, recipe.variants),
        "base": recipe.base,
        "general": recipe.general,
        "slices": [
            {
                "base": slice.base,
                "parameters": slice.parameters,
                "models": [
                    {"model": entry.model, "layers": entry.layers, "parameters": entry.parameters} for entry in slice.entries
                ],
            }
            for slice in recipe.slices
        ],
        "parameters": recipe.parameters,
        "dtype": recipe.dtype,
        "out_dtype": recipe.out_dtype,
        "tokenizer": vars(recipe.tokenizer) if recipe.tokenizer else None,
        "chat_template": recipe.chat_template,
        "seed": recipe.seed,
    }


def identity(recipe: Recipe, models: dict[str, Model], more: dict[str, Any]) -> str:
    """A hash of all that the output depends on, with ``more`` beside the recipe. Inputs are identified by path, size and
    modification time."""
    files = sorted({file for model in models.values() for file in model.files})
    stats = [[str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    text = json.dumps([FORM, describe(recipe), more, stats], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def small_files(recipe: Recipe, models: dict[str, Model], config: dict[str, Any]) -> dict[str, bytes]:
    """The contents, by name, of config.json, the generation config and the tokenizer's files, from the recipe's donor."""
    donor = models[recipe.donor]
    found = donor.carried(("generation_config.json",))
    if config:
        found["config.json"] = as_json(config)
    if recipe.tokenizer is None:
        found |= donor.carried(TOKENIZER_FILES)
    template = chat_template(recipe, models)
    if template is not None:
        found["chat_template.jinja"] = template.encode()
    return found


def out_config(recipe: Recipe, models: dict[str, Model]) -> dict[str, Any]:
    """The donor's configuration with the output's dtype; {} where the donor has none."""
    out, dtype = dict(models[recipe.donor].config), recipe.out_dtype or recipe.dtype
    if out and dtype is not None:
        out["dtype" if "dtype" in out else "torch_dtype"] = dtype
    return out


def chat_template(recipe: Recipe, models: dict[str, Model]) -> str | None:
    """The chat template that the recipe asks for: its own text or, with "auto", the one that most of the models have."""
    asked = recipe.chat_template
    if asked is None:
        return None
    if asked != "auto":
        if "{" not in asked:
            raise UserError(f'chat_template must be "auto" or a Jinja template, got {asked!r}')
        return asked
    found = [template for model in models.values() if (template := own_template(model))]
    return max(found, key=found.count) if found else None


def own_template(model: Model) -> str | None:
    """A model's chat template, from chat_template.jinja or tokenizer_config.json."""
    if text := model.carried(("chat_template.jinja",)).get("chat_template.jinja"):
        return text.decode().strip()
    path = model.directory / "tokenizer_config.json"
    template = read_json(path).get("chat_template") if path.exists() else None
    return template.strip() if isinstance(template, str) else None


def record(recipe: Recipe, outputs: Hashes, inputs: Hashes) -> dict[str, Any]:
    """The content of merge.json."""
    return {"tool": "distmerge", "form": FORM, "recipe": describe(recipe), "inputs": inputs, "outputs": outputs}


def card(recipe: Recipe, name: str) -> bytes:
    """The model card, README.md in the hub's format: what was merged, how, and the recipe."""
    models = recipe.references
    head = ["---", "library_name: transformers", "tags:", "- merge", "- distmerge"]
    hub = [model for model in models if not model.startswith((".", "/", "~")) and model.count("/") == 1]
    head += ["base_model:", *(f"- {model}" for model in hub)] if hub else []
    form = catalogue.variants(recipe.method, recipe.compat, recipe.variants)
    said = recipe.text or json.dumps(describe(recipe), indent=2)
    kind = "json" if not recipe.text else "yaml" if recipe.compat == "mergekit" and "merge_method" in recipe.text else "toml"
    source = catalogue.entry(recipe.method).source
    lines = [
        *head, "---", f"# {name}", "",
        f"A merge of {len(models)} models by [{recipe.method}]({source}), made by distmerge.", "",
        *(f"- `{Path(model).name if model.startswith(('/', '.', '~')) else model}`" for model in models), "",
        f"Form: {recipe.compat} ({', '.join(f'{key} = {value}' for key, value in form.items())}).", "",
        f"```{kind}", said.strip(), "```", "", "Hashes of all inputs and outputs are in `merge.json`.", "",
    ]  # fmt: skip
    return "\n".join(lines).encode()


def as_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class VerifiedModel:
    """A merged model whose files all match its merge.json.

    Attributes:
        path: its directory.
        files: how many files were verified.
    """

    path: Path
    files: int

    def __str__(self) -> str:
        return f"{self.path}: {self.files} files match {RECORD}"


def verify_merged(path: Path) -> VerifiedModel:
    """Hash every file of a merged model and compare it with the record.

    Raises:
        UserError: naming the first file that is missing or does not match merge.json.
    """
    if not (path / RECORD).is_file():
        raise UserError(f"{path} has no {RECORD}, so there is nothing to verify")
    outputs = read_json(path / RECORD).get("outputs")
    if not is_table(outputs) or not all(is_table(entry) for entry in outputs.values()):
        raise UserError(f"{path / RECORD} must have a table of outputs")
    for name, entry in outputs.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{path}: {name} is missing")
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        if digest != entry.get("sha256"):
            raise UserError(f"{path}: {name} does not have the SHA-256 in {RECORD}")
    return VerifiedModel(path, len(outputs))
