"""The sections for training experts: models that are trained in order to be merged. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from distmerge.config.data import Data
from distmerge.config.section import Section
from distmerge.errors import UserError
from distmerge.rules import catalogue


class Lora(Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685) instead of full finetuning, trained with PEFT."""

    rank: int = Field(default=8, ge=1)
    """Rank of the adapters: the number of columns of B and rows of A."""
    alpha: float = Field(default=16.0, gt=0)
    """Scale of the adapters: the weight's change is alpha / rank times B A."""
    targets: list[str] = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], min_length=1
    )
    """Linear layers that get an adapter, by the last part of their names."""


class Expert(Section):
    """A model that is trained in order to be merged. The run trains one if the section is present."""

    skill: str = Field(pattern=r"^[\w.-]+$")
    """Name of the skill that the expert learns, used in file names and reports."""
    base: str | None = None
    """The model from which merges measure the expert's task vector. By default model.path, from which it is trained."""
    lora: Lora | None = None
    """Train an adapter. The output is then an adapter directory in PEFT's format."""


class Stopping(Section):
    """When to stop the training of an expert (https://arxiv.org/abs/2506.14126)."""

    rule: Literal["none", "plateau", "merged"] = "none"
    """plateau: when the run's own evaluation loss no longer improves, lower the learning rate, later stop. merged: stop when
    the loss of the merge with merge_with no longer improves. It is evaluated at the steps of checkpoint.at, and the run ends
    with the step that merged best."""
    patience: int = Field(default=1, ge=1)
    """Number of evaluations in a row without an improvement after which the rule acts. By default 2 for merged."""
    after: int = Field(default=16, ge=1)
    """Evaluations of the merge before this step are ignored, since they are noise before anything is learned (merged)."""
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    """A lower loss counts as an improvement if it is lower than the best by more than this share of it."""
    factor: float = Field(default=0.5, gt=0, lt=1)
    """Factor by which the learning rate is multiplied at a plateau (plateau)."""
    reductions: int = Field(default=1, ge=0)
    """Number of plateaus at which the learning rate is lowered. The next plateau ends the run (plateau)."""
    merge_with: list[str] = Field(default=[])
    """Models to merge with: model directories, and run directories of sibling experts. Of a sibling the newest published step
    is taken that is not later than this run's step (merged)."""
    method: str = "mean"
    """The rule that merges the task vectors of this expert and of merge_with, in the form of its paper. ptm: merge_with is one
    general model, to which scale times this expert's task vector is added (merged)."""
    scale: float = Field(default=1.0, gt=0)
    """Factor on the merged task vector (lambda, omega)."""
    density: float = Field(default=0.2, gt=0, le=1)
    """Share of each task vector's values that sparsifying rules, such as ties and dare, keep."""
    skills: dict[str, Data] = Field(default={})
    """Further data on which the merge is evaluated beside the run's own, by name. The held-out share of each is used."""

    @model_validator(mode="before")
    @classmethod
    def defaults_of_rule(cls, table: Any) -> Any:
        """Set the default of patience, and replace aliases of method. Patience is 2 for merged, since merges are evaluated
        rarely and a later step can make up for one unlucky evaluation."""
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
    """Records at which step each of a sample of training examples is learned. This takes a forward pass over the sample at each
    step of checkpoint.at."""

    track: bool = False
    """Track examples of the training data, drawn with the seed. The results are in RUN_DIR/examples.safetensors."""
    count: int = Field(default=4096, ge=1)
    """Number of examples to track. Each takes 19 bytes, for any number of steps."""
    early: int = Field(default=32, ge=1)
    """The difficulty of examples (EL2N, https://arxiv.org/abs/2107.07075) is measured at the first published step that is not
    before this one."""
    learned: float = Field(default=0.5, gt=0, le=1)
    """Share of an example's tokens that must be predicted correctly for it to count as learned."""
