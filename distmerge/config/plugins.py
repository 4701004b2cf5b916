"""Code from outside that a configuration names: rules in ``plugins``, mergers in ``kind = "module:Class"``. Imports no torch.

Naming a module runs it. So modules are imported where the user names them, in a TOML of their own or on the command line, and
never because the configuration in a run directory does: a directory may come from somebody else. Whoever needs a class later
looks among the modules that are loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.rules.plugins import load_plugins


def in_run_directory(path: str | Path) -> bool:
    """Whether a configuration is a run's record of itself."""
    place = Path(path).resolve().parent
    return (place / "environment.json").exists() or (place / "checkpoints").is_dir()


def named(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Each module that a configuration's table names, after the key that names it. Keys of a wrong type are passed over: the
    schema refuses them."""
    plugins = table.get("plugins")
    for module in plugins if isinstance(plugins, list | tuple) else ():
        if isinstance(module, str):
            yield "config.plugins", module
    merge = table.get("merge")
    for index, entry in enumerate(merge if isinstance(merge, list | tuple) else ()):
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if isinstance(kind, str) and ":" in kind:
            yield f"config.merge[{index}].kind", kind.partition(":")[0]


def load(table: dict[str, Any]) -> None:
    """Import the modules that a configuration of the user's own names.

    Raises:
        UserError: where there is no such module, or it fails while it is imported.
    """
    for key, module in named(table):
        if all(part.isidentifier() for part in module.split(".")):  # else the schema refuses it
            load_plugins([module], key)


def refuse_stored(path: str, table: dict[str, Any], given: set[str]) -> None:
    """Refuse to import what only a run directory's configuration names.

    Args:
        given: modules that the command line names.
    """
    for key, module in named(table):
        if module not in given:
            raise UserError(
                f"{key} {module!r} is not imported for {path}, a run directory's own record: start the run from a TOML of "
                f"yours, or give --plugins {module}"
            )


def loaded(kind: str) -> type:
    """The class that ``module:Class`` names, of a module that was imported before.

    Raises:
        UserError: where there is none.
    """
    module, _, name = kind.partition(":")
    if module not in sys.modules:
        raise UserError(f"kind {kind!r} needs its module to be imported, which a TOML of yours or --plugins {module} does")
    found = getattr(sys.modules[module], name, None)
    if not isinstance(found, type):
        raise UserError(f"kind must name a class of the module {module}, got {name!r}, which is none")
    return found
