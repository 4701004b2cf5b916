"""The methods' table: what each one takes, and what its variants are in the papers and in mergekit. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from distmerge.errors import UserError
from distmerge.merging.recipe import is_number

REQUIRED = object()


class Parameter(NamedTuple):
    """Attributes: what it is in words, for an error; whether a value is allowed; its default, or REQUIRED."""

    allowed: str
    holds: Any
    default: Any = REQUIRED
    each: bool = False


FINITE = ("a finite number", lambda value: True)
PARAMETERS: dict[str, Parameter] = {
    "weight": Parameter(*FINITE, each=True),
    "density": Parameter("in (0, 1]", lambda value: 0 < value <= 1, 1.0, each=True),
    "gamma": Parameter("in [0, 1)", lambda value: 0 <= value < 1, 0.01, each=True),
    "epsilon": Parameter("in [0, 1)", lambda value: 0 <= value < 1, 0.15, each=True),
    "omega": Parameter(*FINITE, each=True),
    "scale": Parameter(*FINITE, None, each=True),
    "lambda": Parameter(*FINITE, 1.0),
    "t": Parameter(*FINITE),
    "select_topk": Parameter("in (0, 1]", lambda value: 0 < value <= 1, 1.0),
    "normalize": Parameter("true or false", None, None),
    "rescale": Parameter("true or false", None, None),
    "int8_mask": Parameter("true or false", None, False),
    "filter_wise": Parameter("true or false", None, False),
    "nuslerp_row_wise": Parameter("true or false", None, False),
    "nuslerp_flatten": Parameter("true or false", None, True),
}

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

FORMS: dict[str, dict[str, str]] = {
    "mergekit": {
        "trim": "tensor", "elect": "after", "divide": "weights", "rescale": "l1", "on_tie": "first", "on_cancel": "positive",
        "epsilon_is": "half", "arithmetic": "input",
    },
    "paper": {
        "trim": "tensor", "elect": "before", "divide": "count", "rescale": "inverse", "on_tie": "keep", "on_cancel": "zero",
        "epsilon_is": "full", "arithmetic": "float32",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """What a method takes.

    Attributes:
        parameters: their names in ``PARAMETERS``.
        base: "needed", "allowed" or "none".
        members: how many models beside the base, least and most.
        normalize, rescale: the defaults of these two.
        sparsify: "magnitude", "outliers", "random", "magprune" or None.
        elect: whether signs are elected.
        paper: variants in which the paper differs from ``FORMS["paper"]``.
        source: where it comes from.
    """

    source: str
    parameters: tuple[str, ...] = ()
    base: str = "needed"
    members: tuple[int, int | None] = (1, None)
    normalize: bool = False
    rescale: bool = False
    sparsify: str | None = None
    elect: bool = False
    paper: dict[str, str] = field(default_factory=dict)


TASK = ("weight", "lambda", "normalize", "int8_mask")
METHODS: dict[str, Method] = {
    "linear": Method("https://arxiv.org/abs/2203.05482", ("weight", "normalize"), "none", normalize=True),
    "slerp": Method("https://dl.acm.org/doi/10.1145/325334.325242", ("t",), "needed", (1, 1)),
    "nuslerp": Method(
        "https://github.com/arcee-ai/mergekit", ("weight", "nuslerp_row_wise", "nuslerp_flatten"), "allowed", (2, 2)
    ),
    "task_arithmetic": Method("https://arxiv.org/abs/2212.04089", TASK),
    "wise_ft": Method("https://arxiv.org/abs/2109.01903", ("omega",), members=(1, 1)),
    "ptm": Method("https://arxiv.org/abs/2410.12937", ("omega",)),
    "ties": Method(
        "https://arxiv.org/abs/2306.01708", (*TASK, "density", "rescale"), normalize=True, sparsify="magnitude", elect=True,
        paper={"trim": "global"},
    ),
    "dare_linear": Method("https://arxiv.org/abs/2311.03099", (*TASK, "density", "rescale"), rescale=True, sparsify="random"),
    "dare_ties": Method(
        "https://arxiv.org/abs/2311.03099", (*TASK, "density", "rescale"), rescale=True, sparsify="random", elect=True
    ),
    "della": Method(
        "https://arxiv.org/abs/2406.11617", (*TASK, "density", "epsilon", "rescale"), normalize=True, rescale=True,
        sparsify="magprune", elect=True,
    ),
    "della_linear": Method(
        "https://arxiv.org/abs/2406.11617", (*TASK, "density", "epsilon", "rescale"), rescale=True, sparsify="magprune"
    ),
    "breadcrumbs": Method(
        "https://arxiv.org/abs/2312.06795", (*TASK, "density", "gamma", "rescale"), sparsify="outliers"
    ),
    "breadcrumbs_ties": Method(
        "https://arxiv.org/abs/2312.06795", (*TASK, "density", "gamma", "rescale"), sparsify="outliers", elect=True
    ),
    "model_stock": Method("https://arxiv.org/abs/2403.19522", ("filter_wise",), members=(2, None)),
    "sce": Method("https://arxiv.org/abs/2408.07990", ("select_topk", "int8_mask")),
    "passthrough": Method("https://github.com/arcee-ai/mergekit", ("scale",), "none", (1, 1)),
}  # fmt: skip

ELSEWHERE = {
    name: "it is a method of mergekit that distmerge does not have"
    for name in ("karcher", "multislerp", "nearswap", "arcee_fusion", "ram", "ramplus_tl")
}


def method(name: str) -> Method:
    """The method of that name.

    Raises:
        UserError: when there is none.
    """
    if name not in METHODS:
        reason = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise UserError(f"method must be one of {', '.join(METHODS)}, got {name!r}{reason}")
    return METHODS[name]


def variants(name: str, compat: str, chosen: dict[str, str]) -> dict[str, str]:
    """Every variant of a method: as chosen, or as ``compat`` has it."""
    for key, value in chosen.items():
        if value not in VARIANTS[key]:
            raise UserError(f"{key} must be one of {', '.join(VARIANTS[key])}, got {value!r}")
    own = METHODS[name].paper if compat == "paper" else {}
    found = FORMS[compat] | own | chosen
    if found["trim"] == "global" and chosen.get("on_tie") == "first":
        raise UserError('on_tie = "first" needs trim = "tensor": a global trim keeps all that equal its threshold')
    return found


def checked(name: str, value: Any, where: str) -> Any:
    """A parameter's value at one place, as a number or a boolean.

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


def divisor(name: str, compat: str, chosen: dict[str, str], shared: dict[str, Any]) -> str:
    """By what a sum of task vectors, or of models, is divided: "weights", "count" or "none"."""
    normalize = shared.get("normalize")
    if normalize is None:
        normalize = METHODS[name].normalize or (compat == "paper" and METHODS[name].elect)
    if name == "linear":
        return "weights" if normalize else "none"
    return variants(name, compat, chosen)["divide"] if normalize or "divide" in chosen else "none"
