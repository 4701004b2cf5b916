"""The sections for checkpoints, windows, previews and recovery. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field, model_validator

from distmerge.config.section import Section, given
from distmerge.errors import UserError


class Checkpoint(Section):
    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    every: int = Field(default=100, ge=1)
    """Steps between checkpoints. There is always one at the end."""
    keep: int = Field(default=3, ge=1)
    """Number of newest checkpoints to keep."""
    at: Literal["powers-of-two", "every"] | None = None
    """Also publish the model itself, for later merges, at steps 1, 2, 4, ... (powers-of-two) or at every checkpoint (every).
    The model directories are in RUN_DIR/steps, and all of them are kept."""
    asynchronous: bool = Field(default=False, alias="async")
    """Write checkpoints in the background while training continues. Needs memory for one more copy of the state. The key is
    async in TOML files."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Dtype of the models in RUN_DIR/steps and RUN_DIR/final. By default that of the model in model.path, or float32 without
    model.path. Adapters and the state for resuming are always written in float32."""


class WindowSettings(Section):
    """Keeps models of consecutive blocks of steps while the learning rate is constant. Merging them replaces a decay of the
    rate. A run has a window if the section is present."""

    every: int | None = Field(default=None, ge=1)
    """Steps per block. Give either this or every_tokens."""
    every_tokens: int | None = Field(default=None, ge=1)
    """Tokens per block over all workers, rounded to whole steps."""
    blocks: int = Field(default=10, ge=0)
    """Number of newest blocks to keep; 0 keeps all."""
    kind: Literal["mean", "snapshot"] = "mean"
    """mean: the mean of the parameters over the block; snapshot: the parameters at the end of the block."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of the published files. The running means are always float32."""
    stride: int = Field(default=1, ge=1)
    """Steps between updates of the mean. If a merger keeps an anchor, the mean is updated at its merges instead."""
    offload: bool = False
    """Keep the running mean in CPU memory instead of GPU memory. Each update then copies the parameters to the CPU."""
    store: Literal["disk", "memory"] = "disk"
    """disk: write model directories into RUN_DIR/window; memory: keep the blocks in the run's state, for previews only."""

    @model_validator(mode="after")
    def one_length(self) -> WindowSettings:
        if (self.every is None) == (self.every_tokens is None):
            raise UserError("every must be given exactly when every_tokens is not, got " + given(self.every, self.every_tokens))
        if self.every is not None and self.stride > self.every:
            raise UserError(f"stride must be <= every = {self.every}, got {self.stride}")
        return self


class PreviewSettings(Section):
    """Evaluates the merged window during training. A run has previews if the section is present."""

    every: int = Field(default=100, ge=1)
    """Steps between previews."""
    curve: str = "linear"
    """The decay of the learning rate that the merge replaces: linear, cosine, 1-sqrt, floor:R, mean, wma, ema:A,
    ema-normalized:A or table:X=D,X=D,..."""
    last: int = Field(default=5, ge=2)
    """Number of newest blocks to merge. Previews begin with two blocks."""


class RecoverySettings(Section):
    enabled: bool = False
    """Detect loss spikes and divergence, and roll back to a checkpoint before them. After each step this reads the loss, which
    synchronizes with the GPU, and checks that the parameters are finite. The start is committed as a checkpoint, too."""
    threshold: float = Field(default=5.5, gt=0)
    """Robust standard deviations above the recent losses at which the loss of a single step is suspicious. For several steps
    in a row the limit is lower. Deviations that the run's own history shows to be ordinary are never suspicious."""
    window: int = Field(default=512, ge=16)
    """Number of healthy steps from which the ordinary losses are estimated. Roll-backs within two windows count as attempts on
    the same spike."""
    margin: int = Field(default=5, ge=0)
    """Steps before its detection at which a spike may have begun. Checkpoints from then on are not trusted."""
    keep_optimizer: Literal["keep", "reset", "average", "rollback"] = "rollback"
    """The inner optimizer's moments after a roll-back. keep: the current ones; reset: none; average: the mean of the merged
    checkpoints' moments; rollback: the checkpoint's own."""
    skip_batches: int = Field(default=10, ge=0)
    """Number of batches around the spike to skip after a roll-back."""
    lr_factor: float = Field(default=1.0, gt=0, le=1)
    """Factor on the learning rate from a roll-back until the end of the cool-down."""
    cool_down: int = Field(default=20, ge=0)
    """After a roll-back, steps beyond the step of the spike until which only values that are not finite count as a spike."""
    attempts: int = Field(default=3, ge=1)
    """Roll-backs for one spike, each further back than the one before. If they do not help, training continues from the
    present state if that is finite and this has not happened before; otherwise the run stops."""
    merge_last: int = Field(default=1, ge=1)
    """Number of stable checkpoints, or blocks of the window, whose merge the run continues from. 1 is a plain roll-back, which
    was as good or better in all measurements."""
