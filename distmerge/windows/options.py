"""What may be chosen for the merge of a window, as the command line and the Python API give it. Imports no torch."""

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
    """The members' weighted mean, with the weights of a learning-rate curve (``distmerge.windows.curves``).

    Attributes: the curve; its quadrature, which is how a curve becomes weights.
    """

    curve: Curve = "linear"
    quadrature: Quadrature = "endpoint"

    @property
    def name(self) -> str:
        """The curve in words."""
        if isinstance(self.curve, str):
            return self.curve
        return getattr(self.curve, "__name__", "a function" if callable(self.curve) else "a table")


@dataclass(frozen=True)
class ByRule:
    """The members merged by a rule of the catalogue.

    Attributes:
        rule: its name.
        base: what the rule's task vectors start from. None takes the oldest member, if the rule needs a base: it is the
            base then, and the others are the members.
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
    """How a window is to be merged: rule "mean" by a curve ("linear", unless another is given), every other rule by itself.

    Args:
        drawn: whether a picture of the weights is asked for.

    Raises:
        UserError: where a curve is given to another rule, the mean is given what only other rules have, the rule needs what
            a window does not have, or there is no such rule.
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
        raise UserError(f"{flag} makes the weights of rule mean alone, got --rule {rule}, too")
    if drawn:
        raise UserError(f"--plot draws the weights of rule mean, and --rule {rule} has none")
    if entry.first == "general":
        raise UserError(f"--rule {rule} needs a general model beside the base, which a window does not have")
    if base is not None and entry.base == "none":
        raise UserError(f"--rule {rule} has no use for a base, got --base {base}")
    return ByRule(rule, base, parameters, compat, seed)


@dataclass(frozen=True)
class WindowOptions(StreamOptions):
    """What may be chosen for a window beside its members and the way they are merged.

    Attributes:
        last: only the newest so many members; None for all.
        steps: only the members that end at steps from the first to the second, both inside.
        dtype: of the output, as safetensors names it; None for the inputs'.
    """

    last: int | None = None
    steps: tuple[int, int] | None = None
    dtype: Literal["F32", "BF16", "F16"] | None = None

    def __post_init__(self) -> None:
        if self.last is not None and self.last < 1:
            raise UserError(f"--last must be >= 1, got {self.last}")
        super().__post_init__()
