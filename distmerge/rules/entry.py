"""What is known of a rule before it is built: an entry of the catalogue. Imports no torch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from distmerge.rules.parameters import PARAMETERS

if TYPE_CHECKING:
    from distmerge.rules.protocol import Rule, Target

Builder = Callable[["Target"], "Rule"]


@dataclass(frozen=True)
class Entry:
    """What is known of a rule before it is built.

    Attributes:
        source: the paper it is from.
        builder: what makes the rule of a ``Target``, or where that is, "module:function", loaded when it is first called.
        parameters: their names in ``PARAMETERS``.
        defaults: of parameters, where they are not those of ``PARAMETERS``.
        base: whether models are merged with a base: "needed", "allowed" or "none". Deltas need none.
        least, most: how many members it takes; ``most`` is None where there is no limit.
        first: the model that is the first of the members where models are merged: the "base", the "general" one, or None.
        linear: whether it is a weighted sum, as an all-reduce computes it.
        elementwise: whether any part of the members gives that part of the result, so that none needs a whole tensor; in the
            form of ``FORMS["workers"]``.
        from_vectors: whether the merged model is the base plus something that depends on the task vectors alone, so that
            whoever merges the same models again and again may keep their task vectors.
        by_tokens: whether the members' weights follow from the tokens and steps of a round, which workers alone know.
        sparsify: how task vectors are thinned: "magnitude", "outliers", "random", "magprune" or None.
        elect: whether signs are elected.
        normalize, rescale: the defaults of these two parameters.
        paper: variants in which the paper differs from ``FORMS["paper"]``.
    """

    source: str
    builder: str | Builder
    parameters: tuple[str, ...] = ()
    defaults: dict[str, Any] = field(default_factory=dict[str, Any])
    base: Literal["needed", "allowed", "none"] = "needed"
    least: int = 1
    most: int | None = None
    first: Literal["base", "general"] | None = None
    linear: bool = False
    elementwise: bool = False
    from_vectors: bool = False
    by_tokens: bool = False
    sparsify: Literal["magnitude", "outliers", "random", "magprune"] | None = None
    elect: bool = False
    normalize: bool = False
    rescale: bool = False
    paper: dict[str, str] = field(default_factory=dict[str, str])

    @property
    def beside(self) -> tuple[int, int | None]:
        """How many models it takes beside its base and its general model, least and most."""
        taken = self.first is not None
        return self.least - taken, None if self.most is None else self.most - taken

    @property
    def compares(self) -> bool:
        """Whether more than one model takes part, the base counted, so that there is something to compare."""
        return self.base != "none" or self.most != 1

    def default(self, parameter: str) -> Any:
        """The parameter's value where none is given, or REQUIRED."""
        return self.defaults.get(parameter, PARAMETERS[parameter].default)

    def load(self) -> Builder:
        """What makes the rule."""
        if not isinstance(self.builder, str):
            return self.builder
        module, _, function = self.builder.partition(":")
        return getattr(importlib.import_module(module), function)
