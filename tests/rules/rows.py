"""The table of rules for the property suite: one row for each rule, with the properties that it declares.

A rule from outside is tested by adding its row. Other suites may run the same table over their own way of bringing members
together.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distmerge.rules import catalogue
from distmerge.rules.custom import rule
from distmerge.rules.protocol import Block, Rule, Target, deltas, onto

SHAPE = (37, 53)
SOME = {"density": 0.3}


@rule("clamped-mean", parameters={"reach": 0.01})
class ClampedMean(Rule):
    """A rule from outside: no member moves an element by more than ``reach``."""

    def __init__(self, target: Target):
        self.reach = target.shared["reach"]

    def merge(self, block: Block, state: Any) -> Tensor:
        base, delta = deltas(block, torch.float32)
        return onto(base, delta.clamp(-self.reach, self.reach).mean(0))


@rule("largest-norm", elementwise=False)
def largest_norm(delta: Tensor, weight: Tensor) -> Tensor:
    """A rule from outside that needs whole tensors: the longest delta."""
    return delta[int((delta.norm(dim=1) * weight).argmax())]


@dataclass(frozen=True)
class Row:
    """A rule and what is declared of it.

    Attributes:
        name: in the catalogue.
        given: parameters, the same for all members.
        variants: that it is built with, beside the workers' form.
        permutes: whether the order of the members does not matter, to rounding.
        fixed: whether identical members give that member, to rounding.
        scales: whether twice the deltas give twice the merged delta, to the bit.
        seeded: whether the seed matters.
        on_disk: whether models in files can be merged by it.
    """

    name: str
    given: dict[str, Any] = field(default_factory=dict)
    variants: dict[str, str] = field(default_factory=dict)
    permutes: bool = True
    fixed: bool = False
    scales: bool = True
    seeded: bool = False
    on_disk: bool = True

    def __str__(self) -> str:
        more = [f"{key}={value}" for key, value in (self.given | self.variants).items()]
        return "-".join([self.name, *more])

    @property
    def entry(self) -> catalogue.Entry:
        return catalogue.entry(self.name)

    @property
    def counts(self) -> list[int]:
        """Numbers of members, 1 to 5, that the rule takes."""
        return [count for count in range(1, 6) if self.entry.least <= count <= (self.entry.most or count)]

    @property
    def count(self) -> int:
        """One such number, 3 where that is allowed."""
        return min(self.counts, key=lambda count: abs(count - 3))

    def target(self, count: int, shape: tuple[int, ...] = SHAPE, seed: int = 0, name: str = "tensor", **more: Any) -> Target:
        """``more``: of ``Target``; ``variants`` in place of the row's own."""
        each, shared = catalogue.spread(self.name, count, self.given)
        return replace(Target(name, shape, each, shared, self.variants, seed=seed), **more)

    def build(self, count: int, seed: int = 0, **more: Any) -> Rule:
        return catalogue.build(self.name, self.target(count, seed=seed, **more))


ROWS = (
    Row("mean", fixed=True),
    Row("mean", {"normalize": False}),
    Row("tokens", fixed=True, on_disk=False),
    Row("radial", fixed=True),
    Row("median", fixed=True),
    Row("trimmed-mean", fixed=True),
    Row("trimmed-mean", {"trim": 0.4}, fixed=True),
    Row("task_arithmetic", {"lambda": 0.7}),
    Row("wise_ft", {"omega": 0.3}),
    Row("ptm", {"omega": 0.5}, permutes=False),
    Row("ties", SOME),
    Row("ties", SOME, {"on_tie": "first"}),
    Row("ties", SOME, {"elect": "after", "divide": "count"}),
    Row("ties", fixed=True),
    Row("dare", SOME, permutes=False, seeded=True),
    Row("dare", SOME, {"rescale": "l1"}, permutes=False, seeded=True),
    Row("dare-ties", SOME, permutes=False, seeded=True),
    Row("della", SOME | {"epsilon": 0.2}, permutes=False, seeded=True),
    Row("della", SOME | {"epsilon": 0.2}, {"rescale": "l1"}, permutes=False, seeded=True),
    Row("della-linear", SOME | {"epsilon": 0.2}, permutes=False, seeded=True),
    Row("breadcrumbs", SOME | {"gamma": 0.1}),
    Row("breadcrumbs-ties", SOME | {"gamma": 0.1}, {"on_tie": "first"}),
    Row("sce", fixed=True),
    Row("sce", {"select_topk": 0.4}),
    Row("model-stock", fixed=True),
    Row("model-stock", {"filter_wise": True}, fixed=True),
    Row("slerp", {"t": 0.3}, permutes=False, fixed=True),
    Row("nuslerp", fixed=True),
    Row("nuslerp", {"nuslerp_flatten": False}, fixed=True),
    Row("passthrough", {"scale": 0.5}),
    Row("clamped-mean", scales=False),
    Row("clamped-mean", {"reach": 0.5}, scales=False),
    Row("largest-norm", fixed=True),
)

TWELVE = {
    "mean", "tokens", "radial", "median", "trimmed-mean", "ties", "dare", "della", "breadcrumbs", "sce", "model-stock", "slerp",
}  # fmt: skip
"""Rules that must give the same from files, from memory and across workers, at the least."""


def rows() -> tuple[Row, ...]:
    """Every row; each rule of the catalogue has one."""
    return ROWS


def members_of(count: int, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    """Deltas that are alike in part, with many equal magnitudes, as half precision leaves them behind."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(shape, generator=generator)
    return [(0.02 * (common + torch.randn(shape, generator=generator))).bfloat16().float() for _ in range(count)]
