"""Types for values read from JSON, YAML and TOML, and type guards for tables and lists."""

from __future__ import annotations

from typing import Any, TypeGuard

Json = Any
"""A value that was read and not yet checked."""


def is_table(value: Json) -> TypeGuard[dict[str, Any]]:
    """Whether it is a table. Keys may be of any type in YAML, so that callers must check them against the names they know."""
    return isinstance(value, dict)


def is_list(value: Json) -> TypeGuard[list[Any]]:
    """Whether it is a list; its items can be of any type."""
    return isinstance(value, list)
