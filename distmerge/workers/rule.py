"""A rule of the catalogue applied to the workers' deltas.

The part of a rule that concerns one member alone, such as trimming, is done by the sender, which has the member's whole delta.
The part across members runs at the owners of an exchange's shares, on ``[M, n / M]``, as it runs on disk. The members are the
workers that count: one of weight 0 is left out, and if too few remain for the rule, the mean is taken.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distmerge.config import mergers
from distmerge.config.rules import Value
from distmerge.finite import finite
from distmerge.rules import catalogue
from distmerge.rules.mean import add_weighted
from distmerge.rules.protocol import Rule, Target
from distmerge.theta.flat import FlatParameters, Slot, pieces
from distmerge.theta.layers import has_rows_of_their_own
from distmerge.workers.collectives import all_reduce, floats
from distmerge.workers.divergence import Divergence
from distmerge.workers.exchange import Reduce, write_mean
from distmerge.workers.fragments import Bucket
from distmerge.workers.group import WorkerGroup
from distmerge.workers.holding import Holding
from distmerge.workers.shares import CUT, WIDE, Piece, Shares, aligned_shares, equal_shares


@dataclass(frozen=True)
class Choice:
    """The rule by which the workers' deltas are merged.

    Attributes:
        name: the rule's name in the catalogue.
        parameters: its own parameters, such as a density.
        above: if given (``auto``), the rule is used while the deltas' correlation is at most this, and the mean above it.
        raises: whether a worker that is not finite makes the merge fail on all workers.
    """

    name: str
    parameters: dict[str, Value]
    above: float | None = None
    raises: bool = True


class WorkerRule:
    """A rule for the buckets of this rank's vector. One bucket holds a whole fragment, and so everything that this rank has of
    its tensors. All workers create it at the same time, since that takes collectives."""

    def __init__(self, choice: Choice, flat: FlatParameters, workers: WorkerGroup):
        self.choice, self.flat, self.workers = choice, flat, workers
        self.slots = {slot.name: slot for slot in flat.layout}
        self.inside = [flat.inside] if flat.inside is not None else []
        self._own: dict[int, Holding] = {}
        self._owned: dict[int, Holding] = {}
        whole = {name: self.rule_of(slot, [1.0] * workers.size, 0) for name, slot in self.slots.items()}
        self.split = choice.above is None and any(rule.parts is not None for rule in whole.values())
        across = {name: self._across(rule) for name, rule in whole.items()}
        self.elementwise = all(rule.passes == 0 and rule.unit == 1 for rule in across.values())
        self.least = max((rule.least for rule in across.values()), default=1)
        self._units = {name: rule.unit for name, rule in (whole if not self.split else across).items()}
        self._each_units = {name: rule.unit for name, rule in whole.items()}
        # Tallies of floats are added block by block, as on disk; others come out the same however a tensor is cut.
        self._grain = CUT if any(not rule.exact for rule in (*whole.values(), *across.values())) else WIDE

    def shares(self, bucket: Bucket) -> Shares:
        """How a bucket is divided among the owners. All workers call it once for each bucket, in the same order."""
        found = list(pieces_of(self.flat, bucket))
        numel = bucket.numel
        whole = {name: math.prod(slot.shape) for name, slot in self.slots.items()}
        if self.elementwise:
            shares = equal_shares(numel, self.workers.size)
        else:
            shares = aligned_shares(found, numel, self.workers.size, self._units.__getitem__)
        start, stop = shares.bounds[self.workers.rank]
        owned = [part for piece in found if (part := piece.within(start, stop))]
        groups = [self.workers.group, *self.inside]
        self._own[bucket.index] = Holding(found, whole, self._each_units.__getitem__, self.inside, grain=self._grain)
        unit_of = one_element if self.elementwise else self._units.__getitem__
        self._owned[bucket.index] = Holding(owned, whole, unit_of, groups, self.workers.ledger, self._grain)
        return shares

    def prepare(self, bucket: Bucket, message: Tensor, weight: float, round: int) -> float:
        """Apply the sender's part to this worker's deltas in place, and return the weight to send. If this worker must not be
        merged, the weight is NaN, and so is every result: all workers refuse it."""
        values = message[:-1]
        if weight > 0 and self.choice.raises and not finite(values):
            values.zero_()
            return math.nan
        if weight > 0 and self.split:
            holding, rank = self._own[bucket.index], self.workers.rank
            rules = {piece.name: self._each(self.slots[piece.name], rank, round) for piece in holding.pieces}
            states = holding.settle(rules, lambda start, stop: [values[start:stop]])
            holding.merge(rules, states, lambda start, stop: [values[start:stop]], values)
        return weight

    def at_owner(self, bucket: Bucket, divergence: Divergence, round: int) -> Reduce:
        """The function by which this worker reduces its share of a bucket."""

        def reduce(rows: list[Tensor], weights: Tensor, out: Tensor) -> None:
            given = floats(weights)
            if any(math.isnan(weight) for weight in given):  # all workers will refuse it
                return
            alive = [member for member, weight in enumerate(given) if weight > 0]
            kept, shares = [rows[member] for member in alive], [given[member] for member in alive]
            if not alive:
                return
            own, merged = square_norms(kept, shares)
            divergence.add_rows(own, merged, len(alive))
            divergence.rule, divergence.because = self._decide(own, merged, len(alive))
            if divergence.rule == "mean" and divergence.because is not None:
                write_mean(kept, shares, out)
                return
            mean_weight = sum(shares) / len(shares)
            rules = {
                name: self._across(self.rule_of(self.slots[name], [one / mean_weight for one in shares], round))
                for name in self._names(bucket)
            }
            holding = self._owned[bucket.index]
            states = holding.settle(rules, lambda a, b: [row[a:b] for row in kept])
            holding.merge(rules, states, lambda a, b: [row[a:b] for row in kept], out)

        return reduce

    def rule_of(self, slot: Slot, weights: list[float], round: int) -> Rule:
        """The rule of a tensor, for members of these weights. The mean of the weights is 1."""
        each, shared = catalogue.spread(self.choice.name, len(weights), self.choice.parameters)
        target = Target(
            name=slot.name,
            shape=tuple(slot.shape),
            each=tuple(own | {"weight": weight} for own, weight in zip(each, weights, strict=True)),
            shared=shared,
            seed=round,
            embedding=has_rows_of_their_own(slot.name),
        )
        return catalogue.build(self.choice.name, target)

    def _each(self, slot: Slot, member: int, round: int) -> Rule:
        parts = self.rule_of(slot, [1.0] * self.workers.size, round).parts
        assert parts is not None, "a rule is split for all tensors or for none"
        return parts[0][member]

    def _across(self, rule: Rule) -> Rule:
        return rule.parts[1] if self.split and rule.parts is not None else rule

    def _decide(self, own: Tensor, merged: Tensor, members: int) -> tuple[str, str | None]:
        """The rule's name, or "mean" if there are too few members or the deltas are too alike to need the rule; and the reason
        if there was a choice. The answer is the same on all workers."""
        if members < max(2, self.least):
            return "mean", f"{self.choice.name} needs {max(2, self.least)} members, and {members} counted"
        if self.choice.above is None:
            return self.choice.name, None
        sums = torch.stack([own, merged])
        for group in (self.workers.group, *self.inside):
            all_reduce(sums, group)
        self.workers.ledger.all_reduce(sums.numel() * sums.element_size())
        own, merged = sums
        correlation = (members * merged / own - 1) / (members - 1) if own > 0 else own
        name = "mean" if correlation > self.choice.above else self.choice.name
        return name, f"the deltas' correlation is {correlation.item():.3f}"

    def _names(self, bucket: Bucket) -> list[str]:
        """All tensors of the bucket, including those of which this rank owns nothing."""
        return list(self._owned[bucket.index].starts)


def choice_of(settings: mergers.DiLoCoSettings) -> Choice | None:
    """The rule that a merger's settings ask for; None for a plain weighted mean, which is an all-reduce."""
    if settings.rule == "mean" and not settings.parameters:
        return None
    name, key = settings.named_rule
    above = settings.auto_above if key == "auto_rule" else None
    return Choice(name, settings.parameters, above, raises=settings.nonfinite == "raise")


def one_element(name: str) -> int:
    """The unit of every tensor where the rule works element by element."""
    return 1


def pieces_of(flat: FlatParameters, bucket: Bucket) -> Iterator[Piece]:
    """The pieces of tensors that the bucket's message holds."""
    at = 0
    parts = flat.parts()
    for run in bucket.slices:
        for part in parts:
            low, high = max(run.start, part.offset), min(run.stop, part.offset + part.numel)
            if low < high:
                place = at + low - run.start
                yield Piece(part.name, part.first + low - part.offset, place, place + high - low)
        at += run.stop - run.start


def square_norms(rows: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    """``(sum_m w_m |row_m|^2 / sum_m w_m, |mean|^2)`` of the rows of a share, float64 scalars."""
    shares = [weight / sum(weights) for weight in weights]
    own = torch.zeros((), dtype=torch.float64, device=rows[0].device)
    merged = torch.zeros_like(own)
    for here in pieces(rows[0], 0, len(rows[0])):
        mean = torch.zeros_like(rows[0][here])
        for row, share in zip(rows, shares, strict=True):
            part = row[here]
            add_weighted(mean, part, share)
            own += torch.dot(part, part).double() * share
        merged += torch.dot(mean, mean).double()
    return own, merged
