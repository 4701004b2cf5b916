"""The options of a window's merge, as the command line and the Python API set them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from distmerge.errors import UserError
from distmerge.merging.options import Compat, StreamOptions
from distmerge.merging.recipe import Setting
from distmerge.rules import catalogue

if TYPE_CHECKING:
    from distmerge.windows.curves import Curve, Quadrature

MEAN = "mean"
"""The rule whose weights come from a curve."""


@dataclass(frozen=True)
class ByCurve:
    """The weighted mean of the members, with weights from a learning-rate curve.

    Attributes:
        curve: see :mod:`distmerge.windows.curves`.
        quadrature: how the curve becomes weights.
    """

    curve: Curve = "linear"
    quadrature: Quadrature = "endpoint"

    @property
    def name(self) -> str:
        """The curve's name, if it has one, for messages and records."""
        if isinstance(self.curve, str):
            return self.curve
        return getattr(self.curve, "__name__", "a function" if callable(self.curve) else "a table")


@dataclass(frozen=True)
class ByRule:
    """A merge by a rule of the catalogue.

    Attributes:
        rule: its name.
        base: the model that the rule's task vectors start from. If it is None and the rule needs a base, the oldest member is
            the base and the others are merged.
        parameters: of the rule, and its variants.
        compat, seed: as in :class:`distmerge.merging.options.MergeOptions`.
    """

    rule: str
    base: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict[str, Setting])
    compat: Compat | None = None
    seed: int | None = None


def way_of(
    rule: str, curve: Curve | None, quadrature: Quadrature, base: str | None, parameters: Mapping[str, Setting],
    compat: Compat | None = None, seed: int | None = None, drawn: bool = False,
) -> ByCurve | ByRule:  # fmt: skip
    """How to merge a window. Rule "mean" takes its weights from a curve ("linear" by default), all other rules take none.

    Args:
        drawn: whether a plot of the weights is asked for.

    Raises:
        UserError: if there is no such rule, it needs what a window does not have, or an option is given that is meant for other
            rules.
    """
    entry = catalogue.check(rule, "--rule")
    rule = catalogue.canonical(rule)
    if rule == MEAN:
        given = (
            ["base"] * (base is not None) + [*parameters] + ["compat"] * (compat is not None) + ["seed"] * (seed is not None)
        )
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} is for other rules: the weights of rule mean come from --curve")
        return ByCurve("linear" if curve is None else curve, quadrature)
    if curve is not None or quadrature != "endpoint":
        flag = "--quadrature" if curve is None else "--curve"
        raise UserError(f"{flag} sets the weights of rule mean only, got it with --rule {rule}")
    if drawn:
        raise UserError(f"--plot draws the weights of rule mean, but --rule {rule} has none")
    if entry.first == "general":
        raise UserError(f"--rule {rule} needs a general model besides the base, which a window does not have")
    if base is not None and entry.base == "none":
        raise UserError(f"--rule {rule} has no use for a base, got --base {base}")
    return ByRule(rule, base, parameters, compat, seed)


@dataclass(frozen=True)
class WindowOptions(StreamOptions):
    """The options of a window besides its members and the way to merge them.

    Attributes:
        last: how many of the newest members to merge; None for all.
        steps: merge only the members whose last steps are from the first to the second of these, inclusive; None for all.
        dtype: of the output, as safetensors names it; None for that of the inputs.
    """

    last: int | None = None
    steps: tuple[int, int] | None = None
    dtype: Literal["F32", "BF16", "F16"] | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise UserError(f"--last must be >= 1, got {self.last}")
        super().__post_init__()
