"""The [[merge]] entries of a configuration, and what they are where the user does not say."""

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
    """Keys beside these are parameters of the rule, see :attr:`parameters`."""

    model_config = ConfigDict(extra="allow")

    kind: Literal["diloco"] = "diloco"
    every: int | None = Field(default=None, ge=1)
    """Inner steps between merges of a parameter (H). By default steps / 100, but at least 10 and at most 100: the number of
    merges matters most. Each merge sends the model once."""
    outer_lr: float | None = Field(default=None, gt=0)
    """Outer learning rate. 1 with momentum 0 is parameter averaging. By default 0.7 for 2 and 3 workers, 1.0 for more."""
    outer_momentum: float | None = Field(default=None, ge=0, lt=1)
    """Outer momentum. By default 0.5, the best with 10 to 250 merges; the paper's 0.9 (kind paper-diloco) wants many more."""
    nesterov: bool = True
    """Nesterov's form of the outer momentum."""
    fragments: int = Field(default=1, ge=1)
    """Parts of the model that merge in turn, staggered over the H steps (Streaming DiLoCo)."""
    fragment_order: Literal["strided", "balanced"] = "strided"
    """strided: blocks dealt out over depth; balanced: by bytes."""
    fragment_patterns: tuple[str, ...] = ()
    """A regular expression for each fragment, found in the names of its parameters, in place of an order."""
    overlap: int = Field(default=0, ge=0)
    """Inner steps that go on while a fragment's collectives run (tau); < every / fragments."""
    mix: float = Field(default=0.0, ge=0, le=1)
    """Share of its own parameters that a worker keeps in a merge (alpha). 1 is no communication but at the end."""
    wire: Wire = "fp32"
    """The format of the values that travel; the integer ones in blocks of 64."""
    error_feedback: bool = False
    """Add what the wire's rounding lost to the next message."""
    rule: str = "mean"
    """What becomes of the workers' deltas: mean, radial (length and direction averaged apart), median, ties or any other rule
    of the catalogue, whose parameters are keys beside it, such as density. tokens: the mean with weights = "tokens". auto: at
    each merge the mean where the deltas correlate, else auto_rule."""
    weights: Literal["equal", "tokens"] = "equal"
    """tokens: workers are weighted by tokens^2 / steps of what they were trained on since the last merge."""
    auto_rule: str = "ties"
    """auto's rule where the deltas don't correlate. The rule's parameters are keys beside it."""
    auto_above: float = Field(default=0.9, ge=-1, le=1)
    """The mean correlation of two workers' deltas above which auto takes the mean."""
    outer_sharded: bool = False
    """Each worker keeps and steps 1/M of the anchor and velocity. Same traffic, no correlation in the metrics."""
    outer_device: Literal["cpu"] | None = None
    """cpu keeps anchor and velocity in host memory."""
    bucket_bytes: int = Field(default=64 * 2**20, ge=4)
    """Bytes of parameters per collective."""
    nonfinite: Nonfinite = "raise"
    """What becomes of NaN and infinity. raise: a merge that would take them in ends the run; leave-out: a worker that has them
    counts for nothing in the merge and takes the others' values (its optimizer's moments stay: see [recovery])."""

    @property
    def parameters(self) -> dict[str, rules.Value]:
        """The rule's own parameters by name, or those of auto's rule."""
        return dict(self.model_extra or {})

    @property
    def named_rule(self) -> tuple[str, str]:
        """The rule that the parameters are of, and the key that names it."""
        return (self.auto_rule, "auto_rule") if self.rule == rules.AUTO else (self.rule, "rule")

    @model_validator(mode="before")
    @classmethod
    def by_tokens(cls, values: Any) -> Any:
        """The short form of the mean with token weights."""
        short = isinstance(values, dict) and values.get("rule") == "tokens"
        return values | {"rule": "mean", "weights": "tokens"} if short else values

    @model_validator(mode="after")
    def of_the_catalogue(self, info: ValidationInfo) -> DiLoCoSettings:
        """Hold the rule and its parameters against the catalogue, and call it by its one name."""
        (given, key), stored = self.named_rule, bool(info.context and info.context.get(STORED))
        if key == "rule" and (self.auto_rule, self.auto_above) != ("ties", 0.9):
            raise UserError(f'rule must be "auto" where auto_rule or auto_above is given, got "{given}"')
        name = rules.known_rule(given, stored, key)
        if name is None:  # from outside, in a run directory's configuration
            return self
        entry = rules.catalogue.entry(name)
        if key == "auto_rule" and rules.is_weighted_mean(name):
            raise UserError(f'auto_rule must be a rule that is no weighted mean, which auto takes by itself, got "{given}"')
        if self.weights == "tokens" and "weight" not in entry.parameters:
            raise UserError(f'weights must be "equal" for rule "{name}", which takes no weights, got "tokens"')
        if self.outer_sharded and not (entry.linear and key == "rule"):
            raise UserError(f'outer_sharded needs a rule that is linear, which "{name}" is not, got true')
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
            raise UserError("error_feedback must be false where wire is fp32, which loses nothing, got true")
        if self.outer_sharded and self.wire != "fp32":
            raise UserError(f"outer_sharded needs wire fp32, since it sends parameters and not deltas, got {self.wire}")
        return self

    @property
    def least_every(self) -> int:
        return self.fragments * (self.overlap + 1)

    def tied_to_layout(self) -> list[str]:
        reasons = [".outer_sharded cuts the anchor by rank"] if self.outer_sharded else []
        return reasons + ([LOST_BY_RANK] if self.error_feedback else [])

    def completed(self, workers: int, steps: int | None = None) -> Self:
        name, key = self.named_rule
        if rules.is_loaded(name):
            rules.check_workers(name, workers, key)
        chosen = {key: value for key, value in outer_of(workers).items() if getattr(self, key) is None}
        return super().completed(workers, steps).model_copy(update=chosen)


class PaperDiLoCoSettings(DiLoCoSettings):
    """DiLoCo with its paper's outer optimizer; any key can be set. The paper merges every 500 steps."""

    kind: Literal["paper-diloco"] = "paper-diloco"  # pyright: ignore[reportIncompatibleVariableOverride]
    outer_lr: float | None = Field(default=PRESETS["paper-diloco"]["outer_lr"], gt=0)
    """Outer learning rate."""
    outer_momentum: float | None = Field(default=PRESETS["paper-diloco"]["outer_momentum"], ge=0, lt=1)
    """Outer momentum."""


class StreamingDiLoCoSettings(DiLoCoSettings):
    """DiLoCo with the settings of its streaming form; any of them can be set."""

    kind: Literal["streaming-diloco"] = "streaming-diloco"  # pyright: ignore[reportIncompatibleVariableOverride]
    fragments: int = Field(default=PRESETS["streaming-diloco"]["fragments"], ge=1)
    """Parts of the model that merge in turn, staggered over the H steps."""
    overlap: int = Field(default=PRESETS["streaming-diloco"]["overlap"], ge=0)
    """Inner steps that go on while a fragment's collectives run (tau)."""
    mix: float = Field(default=PRESETS["streaming-diloco"]["mix"], ge=0, le=1)
    """Share of its own parameters that a worker keeps in a merge (alpha)."""
    wire: Wire = PRESETS["streaming-diloco"]["wire"]
    """The format of the values that travel."""
    error_feedback: bool = PRESETS["streaming-diloco"]["error_feedback"]
    """Add what the wire's rounding lost to the next message."""


class AverageSettings(PeriodicSettings):
    kind: Literal["average", "local-sgd"] = "average"
    """Plain averaging of the parameters: DiLoCo with outer rate 1 and no momentum."""
    every: int | None = Field(default=None, ge=1)
    """Inner steps between merges. By default steps / 100, but at least 10 and at most 100."""
    wire: Wire = "fp32"
    """The format of the values that travel."""
    error_feedback: bool = False
    """Add what the wire's rounding lost to the next message."""
    bucket_bytes: int = Field(default=64 * 2**20, ge=4)
    """Bytes of parameters per collective."""
    nonfinite: Nonfinite = "raise"
    """What becomes of NaN and infinity. raise: a merge that would take them in ends the run; leave-out: a worker that has them
    counts for nothing in the merge and takes the others' values (its optimizer's moments stay: see [recovery])."""

    def tied_to_layout(self) -> list[str]:
        return [LOST_BY_RANK] if self.error_feedback else []


class SPARTASettings(MergerSettings):
    kind: Literal["sparta"] = "sparta"
    fraction: float = Field(default=0.005, gt=0, le=1)
    """Share of the parameters that is averaged in a round (p)."""
    every: int = Field(default=1, ge=1)
    """Inner steps between rounds."""
    selector: Literal["random", "shuffled", "partitioned"] = "partitioned"
    """random: drawn anew each round; shuffled: one permutation cut into chunks; partitioned: a new one each cycle."""
    delay: int = Field(default=0, ge=0)
    """Inner steps that go on while a round is in flight; what comes back is applied as a difference."""
    ema: float = Field(default=0.0, ge=0, lt=1)
    """Smoothing of the differences; costs a vector of the model's size."""
    wire: Wire = "fp32"
    """The format of the values that travel."""
    nonfinite: Nonfinite = "raise"
    """What becomes of NaN and infinity. raise: a merge that would take them in ends the run; leave-out: a worker that has them
    counts for nothing in the merge and takes the others' values (its optimizer's moments stay: see [recovery])."""

    @model_validator(mode="after")
    def lands_in_time(self) -> SPARTASettings:
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
    """Workers never talk; they are averaged once, at the end."""


class OutsideSettings(MergerSettings):
    """A merger from outside of this package. All keys but its kind are its constructor's arguments."""

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
        return [f' of kind "{self.kind}" says nothing of other layouts']


OURS: dict[str, type[MergerSettings]] = {
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
"""The sections of this package's mergers by their kinds."""


def tag_of(entry: Any) -> str | None:
    """Which member of :data:`Merge` an entry is of; None where it does not say its kind."""
    kind = entry.get("kind") if isinstance(entry, dict) else getattr(entry, "kind", None)
    if not isinstance(kind, str):
        return None
    return OURS[kind].__name__ if kind in OURS else OutsideSettings.__name__ if ":" in kind else kind


Merge = Annotated[
    Annotated[DiLoCoSettings, Tag("DiLoCoSettings")]
    | Annotated[PaperDiLoCoSettings, Tag("PaperDiLoCoSettings")]
    | Annotated[StreamingDiLoCoSettings, Tag("StreamingDiLoCoSettings")]
    | Annotated[AverageSettings, Tag("AverageSettings")]
    | Annotated[SPARTASettings, Tag("SPARTASettings")]
    | Annotated[NoMergeSettings, Tag("NoMergeSettings")]
    | Annotated[OutsideSettings, Tag("OutsideSettings")],
    Discriminator(tag_of),
]
