"""The experts axis' sections of the configuration. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distmerge.config.data import Data
from distmerge.config.section import Section
from distmerge.errors import UserError
from distmerge.rules import catalogue


class Lora(Section):
    """Low-rank adapters in place of full finetuning, trained by peft. https://arxiv.org/abs/2106.09685"""

    rank: int = Field(default=8, ge=1)
    """Columns of B and rows of A."""
    alpha: float = Field(default=16.0, gt=0)
    """The adapter is alpha / rank times B A."""
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """The last parts of the names of the linear layers that get one."""


class Expert(Section):
    """A model that is trained to be merged. Given at all, the run trains one."""

    skill: str = Field(pattern=r"^[\w.-]+$")
    """What it learns, in a word; part of file names and reports."""
    base: str | None = None
    """The model that merges measure it from. By default model.path, from which it is trained."""
    lora: Lora | None = None
    """Train an adapter; the output is an adapter's directory in PEFT's format."""


class Stopping(Section):
    """When an expert has trained enough to be merged. https://arxiv.org/abs/2506.14126"""

    rule: Literal["none", "plateau", "merged"] = "none"
    """plateau: the run's own evaluation no longer improves: lower the rate, then stop. merged: the merge with the models
    below no longer improves, looked at where checkpoint.at publishes; the run ends with the step that merged best."""
    patience: int = Field(default=1, ge=1)
    """Evaluations, or for merged looks, in a row without an improvement that are too many; 2 by default for merged."""
    after: int = Field(default=16, ge=1)
    """merged: looks before this step do not count; before anything is learned they are noise."""
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    """Share of the best loss by which a lower one must be lower to be an improvement."""
    factor: float = Field(default=0.5, gt=0, lt=1)
    """What the learning rate is multiplied by on a plateau."""
    reductions: int = Field(default=1, ge=0)
    """Plateaus on which the rate is lowered; the next one ends the run."""
    merge_with: list[str] = Field(default=[])
    """Model directories, and run directories of sibling experts, each at its newest published step that is not later."""
    method: str = "mean"
    """A rule's name: of the task vectors of this expert and of merge_with, in its paper's form. ptm: scale times this expert's
    is added to merge_with, which is the one general model."""
    scale: float = Field(default=1.0, gt=0)
    """On the merged task vector (lambda, omega)."""
    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each task vector that rules keep which thin them, such as ties and dare."""
    skills: dict[str, Data] = Field(default={})
    """Beside the run's own data: what the merge is judged by, each by the held-out share of it."""

    @model_validator(mode="before")
    @classmethod
    def patient(cls, table: Any) -> Any:
        """A merge is looked at seldom, and later steps make up for a look that was unlucky."""
        if isinstance(table, dict) and table.get("rule") == "merged":
            table = {"patience": 2} | table
        if isinstance(table, dict) and isinstance(table.get("method"), str):
            table = table | {"method": catalogue.canonical(table["method"])}
        return table

    @model_validator(mode="after")
    def complete(self) -> Stopping:
        if (self.rule == "merged") != bool(self.merge_with):
            raise UserError(f'merge_with must be given exactly when rule is "merged", got {self.merge_with}')
        entry = catalogue.entry(self.method)
        if self.rule != "merged":
            return self
        members = len(self.merge_with) + 1
        catalogue.check(self.method, "method", members=members, given=("density", "lambda", "omega"))
        if entry.first == "general" and members != 2:
            raise UserError(
                f'merge_with must be one model, the general one, for method "{self.method}", got {len(self.merge_with)}'
            )
        return self


class Examples(Section):
    """What is learned when, example by example: a forward pass over them wherever checkpoint.at publishes."""

    track: bool = False
    """Track examples of the training data, drawn by the seed. RUN_DIR/examples.safetensors holds what is known of each."""
    count: int = Field(default=4096, ge=1)
    """Examples to track; 19 bytes each, whatever the number of steps."""
    early: int = Field(default=32, ge=1)
    """The first published step from here on gives the difficulty, EL2N."""
    learned: float = Field(default=0.5, gt=0, le=1)
    """Share of an example's tokens that must be predicted right for it to count as learned."""
