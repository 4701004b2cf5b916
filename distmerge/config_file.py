"""Reading and writing configurations: TOML, ``--section.key value`` overrides, one-line errors, differences."""

from __future__ import annotations

import difflib
import os
import stat
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import tomli_w
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distmerge.config import Merge, Section, TrainConfig
from distmerge.errors import UserError

S = TypeVar("S", bound=Section)

LAYOUT = ("engine.kind", "engine.reshard_after_forward", "train.batch_size", "train.gradient_accumulation")
"""Keys of the layout: a checkpoint can be read in another one, whose steps have as many sequences."""

MAY_CHANGE = (
    "run_dir",
    "steps",
    "mesh.timeout_seconds",
    "mesh.watchdog_seconds",
    "train.threads",
    "log",
    "evaluate",
    "checkpoint",
    "preview",
    "recovery",
    *LAYOUT,
)
"""Keys, or whole sections, that may differ when a run is resumed. run_dir: a run may be moved."""

LARGEST_BYTES = 1 << 20
"""Of a configuration."""

DEEPEST = 32
"""Tables in tables of a configuration; none that means something comes near."""

MERGE_KINDS: dict[str, type[Section]] = {
    kind: entry for entry in get_args(get_args(Merge)[0]) for kind in get_args(entry.model_fields["kind"].annotation)
}


def read(path: str, overrides: list[str]) -> TrainConfig:
    """The configuration in the TOML file ``path`` with command line overrides such as ``["--mesh.workers", "4"]``."""
    table = read_table(path)
    for key, values in parse_overrides(overrides):
        put(table, key, values)
    return validate(table)


def read_table(path: str) -> dict[str, Any]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise UserError(f"cannot read the configuration {path}: it is no regular file")
        if os.path.getsize(path) > LARGEST_BYTES:
            raise UserError(f"a configuration must have at most {LARGEST_BYTES} bytes, {path} has more")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}") from None
    return parse(text, path)


def parse(text: str, what: str) -> dict[str, Any]:
    """TOML as a table, or one line that says what is wrong with it."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{what} is not valid TOML: it is nested too deep") from None
    except ValueError as error:  # TOMLDecodeError, or a number of thousands of digits
        raise UserError(f"{what} is not valid TOML: {error}") from None


def validate(table: dict[str, Any]) -> TrainConfig:
    return validate_as(TrainConfig, with_settled(table))


def with_settled(table: dict[str, Any]) -> dict[str, Any]:
    """The table with what an earlier start of its run has settled for the keys of [[merge]] that it leaves open.

    Defaults that depend on the run are settled once: a resume that trains for longer merges as often as before.
    """
    try:
        stored = tomllib.loads((Path(table["run_dir"]) / "config.toml").read_text()).get("merge", [])
    except (KeyError, TypeError, ValueError, OSError):  # no run yet, or nothing to be read: others say what is wrong with it
        return table
    merge = table.get("merge")
    if not isinstance(merge, list) or len(merge) != len(stored):
        return table
    return table | {"merge": [settled(entry, before) for entry, before in zip(merge, stored, strict=True)]}


def settled(entry: Any, before: dict[str, Any]) -> Any:
    if not isinstance(entry, dict) or entry.get("kind") != before.get("kind"):
        return entry
    return {key: before[key] for key in ("every", "outer_lr", "outer_momentum") if key in before} | entry


def validate_as(section: type[S], table: dict[str, Any]) -> S:
    """The table as a configuration of another kind than a run's, such as an experiment's."""
    check_texts(table, "config")
    try:
        return section.model_validate(table)
    except ValidationError as error:
        raise UserError(explain(error.errors()[0])) from None


def check_texts(value: Any, key: str, depth: int = 0) -> None:
    """Refuse text that cannot be a path, nor be written into a file (NUL, bytes that are no UTF-8), and endless nesting."""
    if depth > DEEPEST:
        raise UserError(f"{key[:80]}... must be nested at most {DEEPEST} deep")
    if isinstance(value, str) and ("\0" in value or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value))):
        raise UserError(f"{key} must be text without NUL, in UTF-8, got {value!r}")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        check_texts(item, f"{key}[{name}]" if isinstance(name, int) else f"{key}.{name}", depth + 1)


def checked(section: type[S], **values: Any) -> S:
    """A section made by the library's own callers: mistakes are named by the argument alone."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error.errors()[0]).removeprefix("config.")) from None


def dump(config: TrainConfig) -> str:
    """The resolved configuration as TOML; keys that are unset are left out."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, by_alias=True))


def differing_keys(stored: TrainConfig, config: TrainConfig) -> list[str]:
    """Keys, dotted and sorted, whose values differ and that a resume may not change."""
    old, new = flatten(stored.model_dump(mode="json")), flatten(config.model_dump(mode="json"))
    changed = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    return [key for key in changed if key not in MAY_CHANGE and key.split(".")[0] not in MAY_CHANGE]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {
        key: leaf for name, item in items for key, leaf in flatten(item, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def parse_overrides(arguments: list[str]) -> list[tuple[str, list[str]]]:
    """``["--a.b", "1", "--c=2"]`` as ``[("a.b", ["1"]), ("c", ["2"])]``; a hyphen in a key is an underscore."""
    overrides: list[tuple[str, list[str]]] = []
    for argument in arguments:
        if argument.startswith("--"):
            key, equals, value = argument[2:].partition("=")
            overrides.append((key.replace("-", "_"), [value] if equals else []))
        elif overrides:
            overrides[-1][1].append(argument)
        else:
            raise UserError(f"expected --section.key value, got {argument}")
    return overrides


def put(table: dict[str, Any], key: str, values: list[str]) -> None:
    """Set the dotted ``key`` in ``table``; list indices reach into lists, one past the end appends."""
    *parents, last = key.split(".")
    place: Any = table
    for name in parents:
        place = descend(place, name, key)
    if not isinstance(place, dict):
        descend(place, last, key)
        raise UserError(f"--{key} does not lead to a key of the configuration")
    place[last] = coerce(parents, last, key, values)


def descend(place: Any, name: str, key: str) -> Any:
    if isinstance(place, dict) and name == "merge":
        return place.setdefault(name, [])
    if isinstance(place, dict):
        return place.setdefault(name, {})
    if isinstance(place, list) and name.isdigit() and int(name) <= len(place):
        if int(name) == len(place):
            place.append({})
        return place[int(name)]
    if key == f"merge.{name}" and not name.isdigit():
        raise UserError(f"--{key} does not say which [[merge]]; did you mean --merge.0.{name}?")
    raise UserError(f"--{key} does not lead to a key of the configuration")


def coerce(parents: list[str], last: str, key: str, values: list[str]) -> Any:
    """Strings are left to the schema; only lists and the model's free table need a hand."""
    if parents[:2] in (["model", "config"], ["engine", "config"]):
        value = " ".join(values)
        try:
            return tomllib.loads(f"value = {value}")["value"]
        except (ValueError, RecursionError):
            return value
    section = section_at(parents)
    field = fields_of(section).get(last) if section else None
    if field is not None and get_origin(field.annotation) in (list, tuple):
        return values
    if not values:
        if field is not None and field.annotation is bool:
            return True
        if field is None and section is not None:
            return None  # the schema says that there is no such key
        raise UserError(f"--{key} needs a value")
    if len(values) > 1:
        raise UserError(f"--{key} takes one value, got {' '.join(values)}")
    return values[0]


def section_at(location: list[str] | tuple[str | int, ...]) -> type[Section] | None:
    """The section that a dotted key, or an error's location, leads to."""
    section: type[Section] | None = TrainConfig
    for name in location:
        if section is TrainConfig and name == "merge":
            section = None
        elif section is None and name in MERGE_KINDS:
            section = MERGE_KINDS[str(name)]
        elif section is not None:
            field = fields_of(section).get(str(name))
            inner = [field.annotation, *get_args(field.annotation)] if field else []
            section = next((each for each in inner if isinstance(each, type) and issubclass(each, Section)), None)
    return section


def fields_of(section: type[Section]) -> dict[str, FieldInfo]:
    """A section's fields by the names that a file gives them: async is no name in Python."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def explain(error: ErrorDetails) -> str:
    """One line: the key, what is allowed, the value."""
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
        tags = ", ".join(f"'{name}'" for name in MERGE_KINDS)
        said = f"got {context['tag']!r}" if "tag" in context else "and is not given"
        return f"{key}.kind must be one of {tags}, {said}"
    if kind not in ALLOWED:
        return f"{key}: {error['msg']}, got {value!r}"
    shown = value if kind.endswith(("than", "equal")) else repr(value)
    return f"{key} must be {ALLOWED[kind].format(**context)}, got {shown}"


def name_of(location: tuple[str | int, ...]) -> str:
    parts = [part for index, part in enumerate(location) if not (index == 2 and location[0] == "merge" and part in MERGE_KINDS)]
    return "config" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)


OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "learning_rate": ("lr",), "rate": ("lr",), "max_steps": ("steps",), "num_steps": ("steps",), "output_dir": ("run_dir",),
    "num_workers": ("workers",), "replicas": ("workers",), "optimizer": ("name",), "lr_scheduler": ("name",),
    "max_grad_norm": ("gradient_clip",), "grad_clip": ("gradient_clip",), "seq_len": ("sequence_length",),
    "max_length": ("sequence_length",), "timeout": ("timeout_seconds",), "watchdog": ("watchdog_seconds",),
    "per_device_train_batch_size": ("batch_size",), "gradient_accumulation_steps": ("gradient_accumulation",),
    "sync_every": ("every",), "interval": ("every",), "warmup_steps": ("warmup",),
}  # fmt: skip
"""Keys as other tools call them, and as they are called here."""

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
    "string_too_short": "a word, and not empty",
    "too_long": "at most {max_length} long",
}
