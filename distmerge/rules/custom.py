"""Rules of one's own: ``@rule("my-rule")`` on a subclass of ``Rule``, or on a plain function.

    @dm.rule("clipped")
    def clipped(delta, weight):  # [M, n], [M] -> [n]
        return (delta.clamp(-0.1, 0.1) * weight[:, None]).sum(0) / weight.sum()

From then on the name works wherever a rule is named.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeGuard, TypeVar, cast

import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.rules.catalogue import register
from distmerge.rules.entry import Entry
from distmerge.rules.parameters import FINITE, PARAMETERS, Parameter
from distmerge.rules.protocol import Block, Rule, Target, deltas, onto, wide

Formula = Callable[[Tensor, Tensor], Tensor]
"""``(delta [M, n], weight [M]) -> [n]``."""

Made = TypeVar("Made", bound="type[Rule] | Formula")


def is_rule(given: object) -> TypeGuard[type[Rule]]:
    return isinstance(given, type) and issubclass(given, Rule)


class FunctionRule(Rule):
    """A plain function as a rule, of the members' deltas, or of the members themselves where there is no base.

    Args:
        name: the rule's, for an error.
        elementwise: whether any part of the deltas gives that part of the result; otherwise it gets whole tensors.
    """

    def __init__(self, name: str, formula: Formula, elementwise: bool, target: Target):
        self.name, self.formula, self.dtype = name, formula, wide(target.dtype)
        self.weights = torch.tensor([one.get("weight", 1.0) for one in target.each], dtype=self.dtype)
        self.unit = 1 if elementwise else max(1, target.numel)

    def merge(self, block: Block, state: Any) -> Tensor:
        base, delta = deltas(block, self.dtype)
        merged = cast(object, self.formula(delta, self.weights.to(delta.device)))  # whatever the function really gives
        if not isinstance(merged, Tensor) or merged.shape != delta.shape[1:]:
            got = list(merged.shape) if isinstance(merged, Tensor) else type(merged).__name__
            raise UserError(f"rule {self.name} must give a tensor of shape {list(delta.shape[1:])}, got {got}")
        return onto(base, merged.to(self.dtype, copy=True))


def rule(
    name: str, *, elementwise: bool = True, parameters: dict[str, float] | None = None, source: str = "a rule of your own"
) -> Callable[[Made], Made]:
    """Register a rule under a name, which works on all axes from then on. Use as a decorator.

    On a subclass of ``Rule``, which is constructed with a ``Target``; its class attributes say what it needs. Or on a function
    of ``(delta [M, n], weight [M])`` that gives ``[n]``.

    Args:
        name: how recipes and settings call it; hyphens and underscores are the same.
        elementwise: of a function, whether any part of the deltas gives that part of the result.
        parameters: numbers that recipes and settings may set, with their defaults; the rule finds them in ``target.shared``, or
            those that each member has (such as density) in ``target.each``.
        source: where the rule is from, for the catalogue.

    Raises:
        UserError: when the name is taken, or what is decorated is neither.
    """
    for key in parameters or {}:
        PARAMETERS.setdefault(key, Parameter(*FINITE, None))

    def made(of: Made) -> Made:
        given: Any = of
        defaults = {"weight": 1.0} | (parameters or {})
        takes = ("weight", *(key for key in parameters or {} if key != "weight"))
        if is_rule(given):
            # What an instance decides, as a property, may need whole tensors.
            whole = given.passes == 0 and given.unit == 1
            entry = Entry(
                source, given, takes, defaults, "needed" if given.needs_base else "allowed", given.least,
                given.most, linear=given.linear, elementwise=whole,
            )  # fmt: skip
        elif callable(given):
            builder = partial(FunctionRule, name, cast(Formula, given), elementwise)
            entry = Entry(source, builder, takes, defaults, "allowed", elementwise=elementwise)
        else:
            raise UserError(f"rule {name} must be a subclass of Rule or a function of (delta, weight), got {given!r}")
        register(name, entry)
        return of

    return made
