"""The version of distmerge. It is written in pyproject.toml alone, and read from the installed package."""

from __future__ import annotations


def installed_version() -> str:
    """Such as "0.1.0"."""
    from importlib.metadata import version

    return version("distmerge")
