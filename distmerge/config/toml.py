"""Reads and writes configurations: TOML files, ``--section.key value`` overrides, and differences between configurations."""

from __future__ import annotations

import os
import stat
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_origin

import tomli_w
from pydantic import ValidationError

from distmerge.config import plugins
from distmerge.config.errors import explain, fields_of, section_at
from distmerge.config.section import STORED, Section
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError

S = TypeVar("S", bound=Section)

LAYOUT = ("engine.kind", "engine.reshard_after_forward", "train.batch_size", "train.gradient_accumulation")
"""Keys of the layout. A checkpoint can be resumed with another layout whose steps have the same number of sequences."""

MAY_CHANGE = (
    "run_dir",
    "plugins",
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
"""Keys and whole sections that may differ when a run is resumed. run_dir is among them since a run may be moved."""

LARGEST_BYTES = 1 << 20
"""Largest size of a configuration file."""

DEEPEST = 32
"""Deepest nesting of tables in a configuration, far beyond any that makes sense."""


def read(path: str, overrides: list[str]) -> TrainConfig:
    """Read the TOML file ``path`` with overrides of the command line, such as ``["--mesh.workers", "4"]``.

    Modules that the configuration names are imported, see :mod:`distmerge.config.plugins`. For a file in a run directory only
    those that the overrides name are imported.

    Raises:
        UserError: if the file cannot be read or the configuration is not valid.
    """
    table = read_table(path)
    given = parse_overrides(overrides)
    for key, values in given:
        put(table, key, values)
    if plugins.in_run_directory(path):
        plugins.refuse_stored(path, table, {module for key, values in given if key == "plugins" for module in values})
    return validate(table)


def read_stored(path: str) -> TrainConfig:
    """Read the configuration that a run keeps in its run directory. Nothing is imported for it, and rules and mergers of
    plugins that are not loaded are accepted without checks.

    Raises:
        UserError: if the file cannot be read or the configuration is not valid.
    """
    return validate_as(TrainConfig, read_table(path), stored=True)


def read_table(path: str) -> dict[str, Any]:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
            raise UserError(f"cannot read the configuration {path}: it is not a regular file")
        if os.path.getsize(path) > LARGEST_BYTES:
            raise UserError(f"a configuration must have at most {LARGEST_BYTES} bytes, {path} has more")
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the configuration {path}: {getattr(error, 'strerror', None) or error}") from None
    return parse(text, path)


def parse(text: str, what: str) -> dict[str, Any]:
    """Parse TOML.

    Args:
        what: the file or option that the text is from, for errors.

    Raises:
        UserError: if the text is not valid TOML.
    """
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{what} is not valid TOML: it is nested too deep") from None
    except ValueError as error:  # TOMLDecodeError, or an integer with thousands of digits
        raise UserError(f"{what} is not valid TOML: {error}") from None


def validate(table: dict[str, Any]) -> TrainConfig:
    """Validate a user's own configuration, importing the modules that it names.

    Raises:
        UserError: if it is not valid.
    """
    plugins.load(table)
    return validate_as(TrainConfig, with_stored_defaults(table))


def with_stored_defaults(table: dict[str, Any]) -> dict[str, Any]:
    """Fill in keys of [[merge]] that are not given with the defaults that an earlier start of the run has stored.

    Defaults that depend on the run are determined once, so that a resume that trains for longer merges as often as before.
    """
    try:
        stored = tomllib.loads((Path(table["run_dir"]) / "config.toml").read_text()).get("merge", [])
    except (KeyError, TypeError, ValueError, OSError):  # no earlier start, or a file that is not valid, which is reported later
        return table
    merge = table.get("merge")
    if not isinstance(merge, list) or len(merge) != len(stored):
        return table
    return table | {"merge": [entry_with_defaults(entry, before) for entry, before in zip(merge, stored, strict=True)]}


def entry_with_defaults(entry: Any, before: dict[str, Any]) -> Any:
    if not isinstance(entry, dict) or entry.get("kind") != before.get("kind"):
        return entry
    return {key: before[key] for key in ("every", "outer_lr", "outer_momentum") if key in before} | entry


def validate_as(section: type[S], table: dict[str, Any], stored: bool = False) -> S:
    """Validate a table as a configuration of the given class, a run's or another such as an experiment's.

    Args:
        stored: whether the configuration is that of a run directory, for which nothing is imported.

    Raises:
        UserError: if it is not valid.
    """
    check_texts(table, "config")
    try:
        return section.model_validate(table, context={STORED: stored})
    except ValidationError as error:
        raise UserError(explain(error.errors()[0])) from None


def check_texts(value: Any, key: str, depth: int = 0) -> None:
    """Refuse strings that can be neither a path nor written into a file (NUL, bytes that are not UTF-8), and deep nesting.

    Raises:
        UserError: naming the key.
    """
    if depth > DEEPEST:
        raise UserError(f"{key[:80]}... must be nested at most {DEEPEST} deep")
    if isinstance(value, str) and ("\0" in value or (not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value))):
        raise UserError(f"{key} must be text without NUL, in UTF-8, got {value!r}")
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        check_texts(item, f"{key}[{name}]" if isinstance(name, int) else f"{key}.{name}", depth + 1)


def checked(section: type[S], **values: Any) -> S:
    """Validate the arguments of a function of the library as a section. Errors name the argument only.

    Raises:
        UserError: if an argument is not valid.
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error.errors()[0]).removeprefix("config.")) from None


def dump(config: TrainConfig) -> str:
    """The resolved configuration as TOML, without keys whose value is None."""
    return tomli_w.dumps(config.model_dump(mode="json", exclude_none=True, by_alias=True))


def differing_keys(stored: TrainConfig, config: TrainConfig) -> list[str]:
    """The keys that differ and that a resume must not change, dotted and sorted."""
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
    """Parse ``["--a.b", "1", "--c=2"]`` as ``[("a.b", ["1"]), ("c", ["2"])]``. Hyphens in keys become underscores.

    Raises:
        UserError: for a value without a key.
    """
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
    """Set the dotted ``key`` in ``table``. Numbers in the key are indices of lists; the index after the last appends an entry.

    Raises:
        UserError: if the key leads nowhere, or the values are not valid for it.
    """
    *parents, last = key.split(".")
    place: Any = table
    for name in parents:
        place = descend(place, name, key)
    if not isinstance(place, dict):
        descend(place, last, key)
        raise UserError(f"--{key} does not lead to a key of the configuration")
    free = place.get("kind", "") if parents[:1] == ["merge"] else ""
    place[last] = literal(values) if ":" in str(free) and last != "kind" else coerce(parents, last, key, values)


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
    """The value of an override. The schema converts strings, so only lists, flags without a value and tables without a schema
    are handled here."""
    if parents[:2] in (["model", "config"], ["engine", "config"]):
        return literal(values)
    section = section_at(parents)
    field = fields_of(section).get(last) if section else None
    if field is not None and get_origin(field.annotation) in (list, tuple):
        return values
    if not values:
        if field is not None and field.annotation is bool:
            return True
        if field is None and section is not None:
            return None  # the schema reports that there is no such key
        raise UserError(f"--{key} needs a value")
    if len(values) > 1:
        raise UserError(f"--{key} takes one value, got {' '.join(values)}")
    return values[0]


def literal(values: list[str]) -> Any:
    """A value for a table without a schema, parsed as TOML; as a string if it is not valid TOML."""
    value = " ".join(values)
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        return value
