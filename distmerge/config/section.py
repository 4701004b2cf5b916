"""The base class of all sections of the configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

STORED = "stored"
"""Key in the validation context: whether the configuration is that of a run directory, for which nothing is imported."""


class Section(BaseModel):
    """A frozen table of the configuration without unknown keys. The docstrings of its fields are their help texts."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def given(*values: object) -> str:
    """For errors about keys that exclude each other: "both" if all values are given, else "none"."""
    return "both" if all(value is not None for value in values) else "none"
