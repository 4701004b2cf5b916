"""Turns pydantic's errors into one line: the key, its value, what is allowed, and for an unknown key a suggestion."""

from __future__ import annotations

import difflib
from typing import get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distmerge.config.mergers import BUILT_IN, CustomSettings
from distmerge.config.section import Section
from distmerge.config.train import TrainConfig

MERGE_SECTIONS: dict[str, type[Section]] = {section.__name__: section for section in (*BUILT_IN.values(), CustomSettings)}
"""The sections of [[merge]] entries, by the class names that pydantic puts into an error's location."""


def section_at(location: list[str] | tuple[str | int, ...]) -> type[Section] | None:
    """The section to which the parts of a dotted key, or an error's location, lead; None if they lead elsewhere."""
    section: type[Section] | None = TrainConfig
    for name in location:
        if section is TrainConfig and name == "merge":
            section = None
        elif section is None and name in MERGE_SECTIONS:
            section = MERGE_SECTIONS[str(name)]
        elif section is not None:
            field = fields_of(section).get(str(name))
            inner = [field.annotation, *get_args(field.annotation)] if field else []
            section = next((each for each in inner if isinstance(each, type) and issubclass(each, Section)), None)
    return section


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """A section's fields by their keys in TOML. These are aliases where the key is a keyword of Python, such as async."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def explain(error: ErrorDetails) -> str:
    """An error as one line with the key, what is allowed, and the value."""
    location, value, context = error["loc"], error["input"], error.get("ctx", {})
    kind = error["type"]
    key = name_of(location)
    if kind == "value_error":
        return f"{key}.{context['error']}"
    if kind == "missing":
        return f"{key} must be given"
    if kind == "extra_forbidden":
        section = section_at(location[:-1])
        known = sorted(fields_of(section)) if section else []
        near = [name for name in OTHER_NAMES.get(str(location[-1]), ()) if name in known]
        near = near or difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
        return f"{key} is not a known key; " + (f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}")
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = ", ".join(f"'{name}'" for name in BUILT_IN)
        problem = f"got {context['tag']!r}" if "tag" in context else "and is not given"
        return f"{key}.kind must be one of {tags}, {problem}"
    if kind not in ALLOWED:
        return f"{key}: {error['msg']}, got {value!r}"
    shown = value if kind.endswith(("than", "equal")) else repr(value)
    return f"{key} must be {ALLOWED[kind].format(**context)}, got {shown}"


def name_of(location: tuple[str | int, ...]) -> str:
    parts = [part for part in location if part not in MERGE_SECTIONS]
    return "config" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",), "rate": ("lr",), "max_steps": ("steps",), "num_steps": ("steps",), "output_dir": ("run_dir",),
    "num_workers": ("workers",), "replicas": ("workers",), "optimizer": ("name",), "lr_scheduler": ("name",),
    "max_grad_norm": ("gradient_clip",), "grad_clip": ("gradient_clip",), "seq_len": ("sequence_length",),
    "max_length": ("sequence_length",), "timeout": ("timeout_seconds",), "watchdog": ("watchdog_seconds",),
    "per_device_train_batch_size": ("batch_size",), "gradient_accumulation_steps": ("gradient_accumulation",),
    "sync_every": ("every",), "interval": ("every",), "warmup_steps": ("warmup",),
}  # fmt: skip
"""Names that other tools use, and the keys that correspond to them here."""

ALLOWED = {
    "greater_than_equal": ">= {ge:g}",
    "greater_than": "> {gt:g}",
    "less_than_equal": "<= {le:g}",
    "less_than": "< {lt:g}",
    "literal_error": "{expected}",
    "int_type": "an integer",
    "int_parsing": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "finite",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a table",
    "model_type": "a table",
    "model_attributes_type": "a table",
    "string_too_short": "a string that is not empty",
    "too_long": "at most {max_length} long",
}
