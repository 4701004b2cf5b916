"""Imports the user's modules that a configuration names: rules in ``plugins``, mergers in ``kind = "module:Class"``. Imports no
torch.

Importing a module runs its code. So modules are imported only if the user names them, in a TOML file of their own or on the
command line, but never because the configuration in a run directory names them: the directory may come from somebody else. Code
that needs a class later looks it up among the modules that are already loaded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.rules.plugins import load_plugins


def in_run_directory(path: str | Path) -> bool:
    """Whether a configuration file is the one that a run keeps in its run directory."""
    place = Path(path).resolve().parent
    return (place / "environment.json").exists() or (place / "checkpoints").is_dir()


def named(table: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (key, module) for each module that a configuration names. Values of a wrong type are skipped, since the schema
    refuses them later."""
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
    """Import the modules that a user's own configuration names.

    Raises:
        UserError: if a module does not exist or its import fails.
    """
    for key, module in named(table):
        if all(part.isidentifier() for part in module.split(".")):  # the schema refuses other names later
            load_plugins([module], key)


def refuse_stored(path: str, table: dict[str, Any], given: set[str]) -> None:
    """Refuse a run directory's configuration that names modules, unless the command line names them, too.

    Args:
        path: the configuration file.
        given: modules that the command line names.

    Raises:
        UserError: naming the key and the module.
    """
    for key, module in named(table):
        if module not in given:
            raise UserError(
                f"{key} {module!r} is not imported for {path}, a run directory's own record: start the run from a TOML file of "
                f"your own, or give --plugins {module}"
            )


def loaded(kind: str) -> type:
    """The class that ``module:Class`` names; the module must have been imported.

    Raises:
        UserError: if it is not imported, or has no such class.
    """
    module, _, name = kind.partition(":")
    if module not in sys.modules:
        raise UserError(
            f"the module of kind {kind!r} is not imported: name it in a TOML file of your own or by --plugins {module}"
        )
    found = getattr(sys.modules[module], name, None)
    if not isinstance(found, type):
        raise UserError(f"kind must name a class of the module {module}, got {name!r}, which is not one")
    return found
