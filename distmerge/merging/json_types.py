"""Values as JSON, YAML and TOML give them, and the two questions that are asked before one is taken apart."""

from __future__ import annotations

from typing import Any, TypeGuard

Json = Any
"""A value that was read, of which nothing is known yet."""


def is_table(value: Json) -> TypeGuard[dict[str, Any]]:
    """Whether it is a table. YAML's keys need not be strings: whoever takes them for names says which names it knows."""
    return isinstance(value, dict)


def is_list(value: Json) -> TypeGuard[list[Any]]:
    """Whether it is a list, of whatever."""
    return isinstance(value, list)
