"""The version of distmerge. It is defined in pyproject.toml only, and read from the installed package's metadata."""

from __future__ import annotations


def installed_version() -> str:
    """The installed version, such as "0.1.0"."""
    from importlib.metadata import version

    return version("distmerge")
