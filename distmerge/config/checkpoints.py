"""The checkpoints axis' sections of the configuration. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from distmerge.config.section import Section, given
from distmerge.errors import UserError


class Checkpoint(Section):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    every: int = Field(default=100, ge=1)
    """Steps between checkpoints; there is one at the end anyway."""
    keep: int = Field(default=3, ge=1)
    """Newest checkpoints to keep."""
    at: Literal["powers-of-two", "every"] | None = None
    """Steps at which the model itself is published, too, to be merged: 1, 2, 4, ..., or those of every. Model directories
    in RUN_DIR/steps, all of which are kept."""
    asynchronous: bool = Field(default=False, alias="async")
    """In TOML: async. Copy the state and write it in the background, while training goes on; one copy more of the state
    in memory."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the models in RUN_DIR/steps and RUN_DIR/final; by default that of the model in model.path, and float32 without one.
    Adapters are written in float32, and so is all that a resume goes on from."""


class WindowSettings(Section):
    """Blocks of a constant-rate stretch, kept to be merged in place of a decay. Given at all, the run has one."""

    every: int | None = Field(default=None, ge=1)
    """Steps per block; this or every_tokens."""
    every_tokens: int | None = Field(default=None, ge=1)
    """Tokens per block, of all workers, rounded to whole steps."""
    blocks: int = Field(default=10, ge=0)
    """Newest blocks to keep; 0 keeps all."""
    kind: Literal["mean", "snapshot"] = "mean"
    """mean: of theta over the block; snapshot: theta at its end."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of the published files. The means are kept in float32."""
    stride: int = Field(default=1, ge=1)
    """Steps between updates of the mean. Where a merger keeps an anchor, its merges are the updates."""
    offload: bool = False
    """Keep the running mean in the CPU's memory: none of a GPU's, and one copy of theta to the CPU at each update."""
    store: Literal["disk", "memory"] = "disk"
    """disk: model directories in RUN_DIR/window; memory: vectors in the run's state, for previews only."""

    @model_validator(mode="after")
    def one_length(self) -> WindowSettings:
        if (self.every is None) == (self.every_tokens is None):
            raise UserError("every must be given exactly when every_tokens is not, got " + given(self.every, self.every_tokens))
        if self.every is not None and self.stride > self.every:
            raise UserError(f"stride must be <= every = {self.every}, got {self.stride}")
        return self


class PreviewSettings(Section):
    """Evaluations of the merged window while training goes on. Given at all, the run has them."""

    every: int = Field(default=100, ge=1)
    """Steps between previews."""
    curve: str = "linear"
    """The decay that the merge stands for: linear, cosine, 1-sqrt, floor:R, mean, wma, ema:A, ema-normalized:A or
    table:X=D,X=D,..."""
    last: int = Field(default=5, ge=2)
    """Newest blocks to merge; as many as there are, from two on."""


class RecoverySettings(Section):
    enabled: bool = False
    """Watch for spikes, and go back before one. Reads the loss of each step, for which a GPU must be waited, and the sum of
    the parameters after it, which shows whether they are finite. The start is kept as a checkpoint, too."""
    threshold: float = Field(default=5.5, gt=0)
    """Robust standard deviations above the last steps from which the loss of one step is suspected, and accordingly less for
    several. What the run's own history has shown to be ordinary is not, however far out."""
    window: int = Field(default=512, ge=16)
    """Healthy steps from which it is learned what is ordinary. Roll-backs within two windows count as attempts on one spike."""
    margin: int = Field(default=5, ge=0)
    """Steps before its detection at which a spike may have begun: no checkpoint is trusted from then on."""
    keep_optimizer: Literal["keep", "reset", "average", "rollback"] = "rollback"
    """The inner optimizer's moments afterwards: the live ones, none, the mean of the merged checkpoints' or the
    checkpoint's own."""
    skip_batches: int = Field(default=10, ge=0)
    """Batches to leave out around the spike."""
    lr_factor: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate from a roll-back until the spike's step and the cool-down are past."""
    cool_down: int = Field(default=20, ge=0)
    """Steps after the spike's own step, once the run has gone back, until which only a value that is not finite counts."""
    attempts: int = Field(default=3, ge=1)
    """Roll-backs, closer to each other than two windows. Each goes further back than the one before. After them the run goes
    on from where it is, if its values are finite and it has not done so before; else it stops."""
    merge_last: int = Field(default=1, ge=1)
    """Stable checkpoints, or blocks of the window, that are merged where the run goes on; 1 is a plain roll-back, which
    was as good or better wherever it was measured."""
