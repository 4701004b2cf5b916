"""The sections of [[merge]] entries, one for each kind of merger, with their defaults."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import ConfigDict, Discriminator, Field, Tag, ValidationInfo, model_validator

from distmerge.config import rules
from distmerge.config.merger import LOST_BY_RANK, MergerSettings, Nonfinite, PeriodicSettings, Wire
from distmerge.config.presets import PRESETS, outer_of
from distmerge.config.section import STORED
from distmerge.errors import UserError


class DiLoCoSettings(PeriodicSettings):
    """DiLoCo (https://arxiv.org/abs/2311.08105). Keys that are no fields are parameters of the rule, see :attr:`parameters`."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["diloco"] = "diloco"
    every: int | None = Field(default=None, ge=1)
    """Inner steps between merges of a parameter (H). By default steps / 100, but at least 10 and at most 100, since the number
    of merges matters most. Each merge sends the model once."""
    outer_lr: float | None = Field(default=None, gt=0)
    """Outer learning rate. 1 with momentum 0 is parameter averaging. By default 0.7 for 2 and 3 workers, 1.0 for more."""
    outer_momentum: float | None = Field(default=None, ge=0, lt=1)
    """Outer momentum. By default 0.5, the best for 10 to 250 merges. The paper's 0.9 (kind paper-diloco) needs many more."""
    nesterov: bool = True
    """Use Nesterov's form of the outer momentum."""
    fragments: int = Field(default=1, ge=1)
    """Number of parts of the model that merge in turn, staggered over the H steps (Streaming DiLoCo)."""
    fragment_order: Literal["strided", "balanced"] = "strided"
    """How blocks are assigned to fragments. strided: in turn over the depth; balanced: so that fragments have similar sizes."""
    fragment_patterns: tuple[str, ...] = ()
    """Assign parameters to fragments by their names instead: a regular expression for each fragment."""
    overlap: int = Field(default=0, ge=0)
    """Inner steps that are taken while a fragment's collectives run (tau). Must be < every / fragments."""
    mix: float = Field(default=0.0, ge=0, le=1)
    """Share of its own parameters that a worker keeps in a merge (alpha). With 1, merges change no worker until the end."""
    wire: Wire = "fp32"
    """Format of the values sent between workers. int8 and int4 are quantized in blocks of 64 values."""
    error_feedback: bool = False
    """Add the rounding errors of the wire's format to the next message."""
    rule: str = "mean"
    """How the workers' deltas are merged: mean, radial (length and direction averaged separately), median, ties or another rule
    of the catalogue. Parameters of the rule, such as density, are further keys of the entry. tokens: the mean with weights =
    "tokens". auto: at each merge the mean if the deltas correlate, else auto_rule."""
    weights: Literal["equal", "tokens"] = "equal"
    """Weights of the workers in the mean. tokens: tokens^2 / steps, counted since the last merge."""
    auto_rule: str = "ties"
    """The rule that auto uses if the deltas do not correlate. Its parameters are further keys of the entry."""
    auto_above: float = Field(default=0.9, ge=-1, le=1)
    """auto uses the mean if the mean correlation between two workers' deltas is above this value."""
    outer_sharded: bool = False
    """Each of the M workers keeps and updates 1/M of the anchor and velocity. The traffic is the same, but the metrics have no
    correlation."""
    outer_device: Literal["cpu"] | None = None
    """cpu: keep anchor and velocity in host memory."""
    bucket_bytes: int = Field(default=64 * 2**20, ge=4)
    """Bytes of parameters per collective."""
    nonfinite: Nonfinite = "raise"
    """How merges treat NaN and infinity. raise: end the run before they are merged; leave-out: exclude the workers that have
    them, and give those workers the others' result (their optimizer moments stay, see [recovery])."""

    @property
    def parameters(self) -> dict[str, rules.Value]:
        """The parameters of ``rule``, or with auto those of ``auto_rule``, by name."""
        return dict(self.model_extra or {})

    @property
    def named_rule(self) -> tuple[str, str]:
        """The rule to which the parameters belong, and the key that names it."""
        return (self.auto_rule, "auto_rule") if self.rule == rules.AUTO else (self.rule, "rule")

    @model_validator(mode="before")
    @classmethod
    def by_tokens(cls, values: Any) -> Any:
        """Accept rule = "tokens" as a short form of the mean with token weights."""
        short = isinstance(values, dict) and values.get("rule") == "tokens"
        return values | {"rule": "mean", "weights": "tokens"} if short else values

    @model_validator(mode="after")
    def check_rule(self, info: ValidationInfo) -> DiLoCoSettings:
        """Check the rule and its parameters against the catalogue, and replace aliases by the rule's name."""
        (given, key), stored = self.named_rule, bool(info.context and info.context.get(STORED))
        if key == "rule" and (self.auto_rule, self.auto_above) != ("ties", 0.9):
            raise UserError(f'rule must be "auto" if auto_rule or auto_above is given, got "{given}"')
        name = rules.known_rule(given, stored, key)
        if name is None:  # a plugin's rule in a run directory's configuration, which loads no plugins
            return self
        entry = rules.catalogue.entry(name)
        if key == "auto_rule" and rules.is_weighted_mean(name):
            raise UserError(f'auto_rule must not be a weighted mean, which auto uses if deltas correlate, got "{given}"')
        if self.weights == "tokens" and "weight" not in entry.parameters:
            raise UserError(f'weights must be "equal" for rule "{name}", which takes no weights, got "tokens"')
        if self.outer_sharded and not (entry.linear and key == "rule"):
            raise UserError(f'outer_sharded must be false for rule "{name}", which is not linear, got true')
        settled = rules.check_parameters(name, self.parameters, list(type(self).model_fields))
        object.__setattr__(self, key, name)  # frozen from here on
        object.__setattr__(self, "__pydantic_extra__", settled)
        return self

    @model_validator(mode="after")
    def consistent(self) -> DiLoCoSettings:
        if self.every is not None and self.fragments > self.every:
            raise UserError(f"fragments must be <= every = {self.every}, got {self.fragments}")
        if self.fragment_patterns and len(self.fragment_patterns) != self.fragments:
            given = len(self.fragment_patterns)
            raise UserError(f"fragment_patterns must be as many as fragments = {self.fragments}, got {given}")
        if self.every is not None and self.overlap and self.overlap * self.fragments >= self.every:
            raise UserError(f"overlap must be < every / fragments = {self.every / self.fragments:g}, got {self.overlap}")
        if self.error_feedback and self.wire == "fp32":
            raise UserError("error_feedback must be false if wire is fp32, which has no rounding errors, got true")
        if self.outer_sharded and self.wire != "fp32":
            raise UserError(f"wire must be fp32 with outer_sharded, which sends parameters instead of deltas, got {self.wire}")
        return self

    @property
    def least_every(self) -> int:
        return self.fragments * (self.overlap + 1)

    def tied_to_layout(self) -> list[str]:
        reasons = [".outer_sharded divides the anchor by rank"] if self.outer_sharded else []
        return reasons + ([LOST_BY_RANK] if self.error_feedback else [])

    def completed(self, workers: int, steps: int | None = None) -> Self:
        name, key = self.named_rule
        if rules.is_loaded(name):
            rules.check_workers(name, workers, key)
        chosen = {key: value for key, value in outer_of(workers).items() if getattr(self, key) is None}
        return super().completed(workers, steps).model_copy(update=chosen)


class PaperDiLoCoSettings(DiLoCoSettings):
    """DiLoCo with the outer optimizer of its paper (https://arxiv.org/abs/2311.08105), which merges every 500 steps. All keys
    can be changed."""

    kind: Literal["paper-diloco"] = "paper-diloco"  # pyright: ignore[reportIncompatibleVariableOverride]
    outer_lr: float | None = Field(default=PRESETS["paper-diloco"]["outer_lr"], gt=0)
    """Outer learning rate."""
    outer_momentum: float | None = Field(default=PRESETS["paper-diloco"]["outer_momentum"], ge=0, lt=1)
    """Outer momentum."""


class StreamingDiLoCoSettings(DiLoCoSettings):
    """DiLoCo with the settings of Streaming DiLoCo (https://arxiv.org/abs/2501.18512). All keys can be changed."""

    kind: Literal["streaming-diloco"] = "streaming-diloco"  # pyright: ignore[reportIncompatibleVariableOverride]
    fragments: int = Field(default=PRESETS["streaming-diloco"]["fragments"], ge=1)
    """Number of parts of the model that merge in turn, staggered over the H steps."""
    overlap: int = Field(default=PRESETS["streaming-diloco"]["overlap"], ge=0)
    """Inner steps that are taken while a fragment's collectives run (tau)."""
    mix: float = Field(default=PRESETS["streaming-diloco"]["mix"], ge=0, le=1)
    """Share of its own parameters that a worker keeps in a merge (alpha)."""
    wire: Wire = PRESETS["streaming-diloco"]["wire"]
    """Format of the values sent between workers."""
    error_feedback: bool = PRESETS["streaming-diloco"]["error_feedback"]
    """Add the rounding errors of the wire's format to the next message."""


class AverageSettings(PeriodicSettings):
    kind: Literal["average", "local-sgd"] = "average"
    """Plain averaging of the parameters (local SGD), which is DiLoCo with outer learning rate 1 and no momentum."""
    every: int | None = Field(default=None, ge=1)
    """Inner steps between merges. By default steps / 100, but at least 10 and at most 100."""
    wire: Wire = "fp32"
    """Format of the values sent between workers. int8 and int4 are quantized in blocks of 64 values."""
    error_feedback: bool = False
    """Add the rounding errors of the wire's format to the next message."""
    bucket_bytes: int = Field(default=64 * 2**20, ge=4)
    """Bytes of parameters per collective."""
    nonfinite: Nonfinite = "raise"
    """How merges treat NaN and infinity. raise: end the run before they are merged; leave-out: exclude the workers that have
    them, and give those workers the others' result (their optimizer moments stay, see [recovery])."""

    def tied_to_layout(self) -> list[str]:
        return [LOST_BY_RANK] if self.error_feedback else []


class SPARTASettings(MergerSettings):
    kind: Literal["sparta"] = "sparta"
    """SPARTA: average a small part of the parameters at every round."""
    fraction: float = Field(default=0.005, gt=0, le=1)
    """Share of the parameters that is averaged in a round (p)."""
    every: int = Field(default=1, ge=1)
    """Inner steps between rounds."""
    selector: Literal["random", "shuffled", "partitioned"] = "partitioned"
    """How a round's parameters are chosen. random: drawn independently in each round; shuffled: consecutive chunks of one fixed
    permutation; partitioned: chunks of a permutation that is drawn anew after each cycle."""
    delay: int = Field(default=0, ge=0)
    """Inner steps that are taken while a round is in flight. Its result is then applied as a difference."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Smoothing of the differences, which needs memory for one more vector of the model's size."""
    wire: Wire = "fp32"
    """Format of the values sent between workers. int8 and int4 are quantized in blocks of 64 values."""
    nonfinite: Nonfinite = "raise"
    """How merges treat NaN and infinity. raise: end the run before they are merged; leave-out: exclude the workers that have
    them, and give those workers the others' result (their optimizer moments stay, see [recovery])."""

    @model_validator(mode="after")
    def delay_within_cycle(self) -> SPARTASettings:
        cycle = math.ceil(1 / self.fraction) * self.every
        if self.selector != "random" and self.delay > cycle:
            raise UserError(
                f'delay must be <= {cycle} steps for selector "{self.selector}", a cycle of 1 / fraction rounds, after which '
                f"the same parameters are sent again, got {self.delay}"
            )
        return self

    def tied_to_layout(self) -> list[str]:
        return [" of kind sparta draws its indices from a rank's part of the model"]


class NoMergeSettings(MergerSettings):
    kind: Literal["none"] = "none"
    """Workers do not communicate during training. Their models are averaged once, at the end."""


class CustomSettings(MergerSettings):
    """A merger that is defined outside of this package. All keys except kind are arguments of its constructor."""

    model_config = ConfigDict(extra="allow")

    kind: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    """``module:Class``."""

    @property
    def module(self) -> str:
        return self.kind.partition(":")[0]

    @property
    def arguments(self) -> dict[str, Any]:
        return dict(self.model_extra or {})

    def tied_to_layout(self) -> list[str]:
        return [f' of kind "{self.kind}" is not known to support other layouts']


BUILT_IN: dict[str, type[MergerSettings]] = {
    kind: section
    for section in (
        DiLoCoSettings,
        PaperDiLoCoSettings,
        StreamingDiLoCoSettings,
        AverageSettings,
        SPARTASettings,
        NoMergeSettings,
    )
    for kind in get_args(section.model_fields["kind"].annotation)
}
"""The sections of this package's mergers by kind."""


def tag_of(entry: Any) -> str | None:
    """The tag of the member of :data:`Merge` that an entry belongs to; None if it has no kind."""
    kind = entry.get("kind") if isinstance(entry, dict) else getattr(entry, "kind", None)
    if not isinstance(kind, str):
        return None
    return BUILT_IN[kind].__name__ if kind in BUILT_IN else CustomSettings.__name__ if ":" in kind else kind


Merge = Annotated[
    Annotated[DiLoCoSettings, Tag("DiLoCoSettings")]
    | Annotated[PaperDiLoCoSettings, Tag("PaperDiLoCoSettings")]
    | Annotated[StreamingDiLoCoSettings, Tag("StreamingDiLoCoSettings")]
    | Annotated[AverageSettings, Tag("AverageSettings")]
    | Annotated[SPARTASettings, Tag("SPARTASettings")]
    | Annotated[NoMergeSettings, Tag("NoMergeSettings")]
    | Annotated[CustomSettings, Tag("CustomSettings")],
    Discriminator(tag_of),
]
