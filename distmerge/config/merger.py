"""Base classes of the sections of [[merge]] entries. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from distmerge.config.presets import every_of
from distmerge.config.section import Section
from distmerge.errors import UserError

FEW_MERGES = 30
"""With fewer merges than this in a run, merging raises the loss by several percent with any settings."""


class MergerSettings(Section):
    """The methods of every [[merge]] entry."""

    def completed(self, workers: int, steps: int | None = None) -> Self:
        """A copy with values for the keys that were not given and whose defaults depend on the run.

        Args:
            workers: number of workers.
            steps: number of steps of the run, if it is known.

        Raises:
            UserError: for a key that must be given, or one that is not valid for this number of workers.
        """
        return self

    def warning(self, steps: int) -> str | None:
        """A warning to print before a run of ``steps`` steps, or None."""
        return None

    def tied_to_layout(self) -> list[str]:
        """The reasons why this merger's state can't be resumed with another number of ranks per worker; empty if it can. Each
        reason continues a sentence that begins with the entry, such as ``merge[0]``."""
        return []


class PeriodicSettings(MergerSettings):
    """A merger that merges each parameter every ``every`` steps."""

    every: int | None = Field(default=None, ge=1)

    def completed(self, workers: int, steps: int | None = None) -> Self:
        if self.every is not None:
            return self
        if steps is None:
            raise UserError("every must be an integer, got None")
        return self.model_copy(update={"every": every_of(steps, self.least_every)})

    @property
    def least_every(self) -> int:
        """The smallest ``every`` that the other keys allow."""
        return 1

    def warning(self, steps: int) -> str | None:
        assert self.every is not None, "a configuration is complete"
        merges = steps // self.every
        if merges >= FEW_MERGES:
            return None
        return (
            f"{steps} steps with every = {self.every} give {merges} merges; with fewer than about {FEW_MERGES}, merging raises "
            "the loss by several percent: lower every, or train for longer"
        )


Wire = Literal["fp32", "bf16", "int8", "int4"]
Nonfinite = Literal["raise", "leave-out"]
LOST_BY_RANK = ".error_feedback keeps the rounding errors of each rank's messages"
