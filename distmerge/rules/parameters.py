"""The parameters and variants that rules have: what they are called, which values are allowed. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from distmerge.errors import UserError

REQUIRED = object()
"""Stands for the default of a parameter that must be given."""

Compat = Literal["paper", "mergekit", "workers"]


class Parameter(NamedTuple):
    """A parameter of some rules.

    Attributes:
        allowed: what it must be, in words, for an error.
        holds: whether a number is allowed; None for a boolean.
        default: its value where none is given, or REQUIRED.
        each: whether every member has its own.
    """

    allowed: str
    holds: Callable[[float], bool] | None
    default: Any = REQUIRED
    each: bool = False


def anything(value: float) -> bool:
    """Whether it is finite is asked where a setting is read."""
    return True


def positive_share(value: float) -> bool:
    return 0 < value <= 1


def share_below_one(value: float) -> bool:
    return 0 <= value < 1


def share_below_half(value: float) -> bool:
    return 0 <= value < 0.5


FINITE = ("a finite number", anything)
PARAMETERS: dict[str, Parameter] = {
    "weight": Parameter(*FINITE, each=True),
    "density": Parameter("in (0, 1]", positive_share, 1.0, each=True),
    "gamma": Parameter("in [0, 1)", share_below_one, 0.01, each=True),
    "epsilon": Parameter("in [0, 1)", share_below_one, 0.15, each=True),
    "omega": Parameter(*FINITE, each=True),
    "scale": Parameter(*FINITE, None, each=True),
    "lambda": Parameter(*FINITE, 1.0),
    "t": Parameter(*FINITE),
    "trim": Parameter("in [0, 0.5)", share_below_half, 0.1),
    "select_topk": Parameter("in (0, 1]", positive_share, 1.0),
    "normalize": Parameter("true or false", None, None),
    "rescale": Parameter("true or false", None, None),
    "int8_mask": Parameter("true or false", None, False),
    "filter_wise": Parameter("true or false", None, False),
    "nuslerp_row_wise": Parameter("true or false", None, False),
    "nuslerp_flatten": Parameter("true or false", None, True),
}
"""By name. ``normalize`` and ``rescale`` follow from the rule where they are None, see ``catalogue.settled``."""

VARIANTS: dict[str, tuple[str, ...]] = {
    "trim": ("tensor", "global"),
    "elect": ("before", "after"),
    "divide": ("weights", "count", "none"),
    "rescale": ("inverse", "l1", "none"),
    "on_tie": ("first", "keep"),
    "on_cancel": ("positive", "zero"),
    "epsilon_is": ("half", "full"),
    "arithmetic": ("float32", "input"),
}
"""The choices in which papers and tools of the same name differ. Two of them, ``trim`` (a number) and ``rescale`` (a boolean),
are also the names of parameters."""

FORMS: dict[str, dict[str, str]] = {
    "mergekit": {
        "trim": "tensor", "elect": "after", "divide": "weights", "rescale": "l1", "on_tie": "first", "on_cancel": "positive",
        "epsilon_is": "half", "arithmetic": "input",
    },
    "paper": {
        "trim": "tensor", "elect": "before", "divide": "count", "rescale": "inverse", "on_tie": "keep", "on_cancel": "zero",
        "epsilon_is": "full", "arithmetic": "float32",
    },
    "workers": {
        "trim": "tensor", "elect": "before", "divide": "weights", "rescale": "inverse", "on_tie": "keep", "on_cancel": "zero",
        "epsilon_is": "full", "arithmetic": "float32",
    },
}  # fmt: skip
"""The variants that hold unless the user chooses others: mergekit's, those of the papers, or those for merges across workers,
whose weights differ from round to round, so that a sum of deltas is always divided by them."""


def is_number(value: Any) -> bool:
    """Whether a value is a number, or a string that spells one: YAML reads 1e-3 as a string."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_variant(key: str, value: Any) -> bool:
    """Whether a key that is the name of a variant has a variant's value, where it may be a parameter's, too."""
    return key in VARIANTS and (key not in PARAMETERS or (isinstance(value, str) and not is_number(value)))


def half_width(form: dict[str, str], epsilon: float) -> float:
    """Half the width of DELLA's window of probabilities, which is mergekit's epsilon, and half of the paper's."""
    return epsilon / 2 if form["epsilon_is"] == "full" else epsilon


def checked(name: str, value: Any, where: str) -> Any:
    """Check the value of a parameter and return it as a number or a boolean.

    Raises:
        UserError: when it is neither, or out of bounds.
    """
    parameter = PARAMETERS[name]
    if parameter.holds is None:
        if value in (0, 1):  # YAML users write 1.0, and mergekit takes it
            value = bool(value)
        if not isinstance(value, bool):
            raise UserError(f"{name} of {where} must be {parameter.allowed}, got {value!r}")
        return value
    if not is_number(value) or not parameter.holds(float(value)):
        raise UserError(f"{name} of {where} must be {parameter.allowed}, got {value!r}")
    return float(value)
