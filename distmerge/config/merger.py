"""What the sections of all [[merge]] entries share. Imports no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field

from distmerge.config.presets import every_of
from distmerge.config.section import Section
from distmerge.errors import UserError

FEW_MERGES = 30
"""With fewer merges than this in a run, the loss that merging costs is several percent whatever the settings."""


class MergerSettings(Section):
    """What every entry can do: become complete, and say what it warns of."""

    def completed(self, workers: int, steps: int | None = None) -> Self:
        """With a value for each key that depends on the run and was not given."""
        return self

    def warning(self, steps: int) -> str | None:
        """What a user should know before a run of so many steps."""
        return None

    def tied_to_layout(self) -> list[str]:
        """Why this merger's state can't be carried over to another number of ranks per worker, if it can't; each follows the
        entry's name."""
        return []


class PeriodicSettings(MergerSettings):
    """A merger of all parameters in turn."""

    every: int | None = Field(default=None, ge=1)

    def completed(self, workers: int, steps: int | None = None) -> Self:
        if self.every is not None:
            return self
        if steps is None:
            raise UserError("every must be an integer, got None")
        return self.model_copy(update={"every": every_of(steps, self.least_every)})

    @property
    def least_every(self) -> int:
        return 1

    def warning(self, steps: int) -> str | None:
        assert self.every is not None, "a configuration is complete"
        merges = steps // self.every
        if merges >= FEW_MERGES:
            return None
        return (
            f"{steps} steps with every = {self.every} are {merges} merges; with fewer than {FEW_MERGES} or so, merging costs "
            "several percent of the loss: lower every, or train for longer"
        )


Wire = Literal["fp32", "bf16", "int8", "int4"]
Nonfinite = Literal["raise", "leave-out"]
LOST_BY_RANK = ".error_feedback remembers what each rank's messages lost"
