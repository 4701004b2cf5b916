"""Rules from outside: modules that the user names, and the rules of installed packages. Imports no torch."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path

from distmerge.errors import UserError

GROUP = "distmerge.rules"
"""The entry points by which an installed package offers rules: a rule's name, and the module that makes it."""


def load_plugins(modules: list[str]) -> None:
    """Import the modules that the user's own settings name, each of which registers rules of its own.

    They may also lie in the working directory. Each is imported once.

    Raises:
        UserError: when one cannot be imported.
    """
    here = str(Path.cwd())
    for module in modules:
        added = here not in sys.path
        if added:
            sys.path.append(here)
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except ModuleNotFoundError as error:
            if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
                raise UserError(f"plugins: there is no module {module} on Python's path or in {here}") from None
            raise UserError(f"plugins: {module} imports {error.name}, which is not installed") from None
        except Exception as error:
            raise UserError(f"plugins: {module} cannot be imported: {type(error).__name__}: {error}") from error
        finally:
            if added:
                sys.path.remove(here)


def load_entry_point(name: str) -> None:
    """Import the installed module that offers a rule of that name, if there is one.

    Raises:
        UserError: when it cannot be imported.
    """
    for point in entry_points(group=GROUP):
        if point.name.replace("-", "_") == name.replace("-", "_"):
            try:
                point.load()
            except Exception as error:
                raise UserError(f"rule {name}: {point.value} cannot be loaded: {type(error).__name__}: {error}") from error
