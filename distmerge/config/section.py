"""What every section of the configuration is."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

STORED = "stored"
"""In a validation's context: whether a run directory keeps the configuration, so that nothing is imported for it."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def given(*values: object) -> str:
    return "both" if all(value is not None for value in values) else "none"
