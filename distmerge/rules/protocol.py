"""What a rule over a tensor's blocks is, and the rule run on tensors in memory.

A tensor is cut into blocks of a fixed size. A rule may first pass over all blocks and measure (a histogram, norms); what it
measured is tallied; then it merges block by block. Blocks are the same for every thread count, chunk and shard, and tallies
are summed in the blocks' order, so the result is the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from distmerge.rules.torch_typed import to_list, vector_norm

BLOCK = 1 << 19
"""Elements of a block on a CPU. Smaller blocks stay in a nearer cache, but then threads wait for the interpreter lock."""


INTEGERS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
"""The integer type that is as wide as each float type, through which a float's bits are read."""


@dataclass(frozen=True, slots=True)
class Block:
    """One block of every member.

    Attributes:
        members: M tensors ``[n]``, each in its own dtype.
        base: ``[n]``, or None for rules without one.
        start: the offset of the block's first element in the flattened tensor.
        index: which block of the tensor it is.
    """

    members: list[Tensor]
    base: Tensor | None
    start: int
    index: int


class Measured(NamedTuple):
    """What one block adds to a tally. ``added`` holds integers, exact in any order; ``kept`` is stored block by block."""

    added: dict[str, Tensor] = {}  # noqa: RUF012
    kept: dict[str, Tensor] = {}  # noqa: RUF012


class Tally:
    """The measurements of all blocks of a tensor, or of many tensors if they are only added up."""

    def __init__(self) -> None:
        self.added: dict[str, Tensor] = {}
        self._kept: dict[str, dict[int, Any]] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, index: int, measured: Measured) -> None:
        for name, value in measured.added.items():
            assert not value.is_floating_point(), "sums of floats depend on their order; keep them"
            if name in self.added:
                self.added[name].add_(value)
            else:
                self.added[name] = value.clone()
        for name, value in measured.kept.items():
            # Stored as Python numbers: small tensors that stay alive would pin hundreds of megabytes of the allocator's memory.
            self._kept.setdefault(name, {})[index] = to_list(value)
            self._dtypes[name] = value.dtype

    def join(self, other: Tally) -> None:
        """Add the measurements of other blocks."""
        for name, value in other.added.items():
            self.added[name] = self.added[name] + value if name in self.added else value
        for name, parts in other._kept.items():
            self._kept.setdefault(name, {}).update(parts)
        self._dtypes |= other._dtypes

    def blocks(self, name: str) -> Tensor:
        """``[blocks, ...]``: the measurement of every block, in the order of the blocks."""
        parts = self._kept[name]
        return torch.tensor([parts[index] for index in sorted(parts)], dtype=self._dtypes[name])

    def total(self, name: str) -> Tensor:
        """The sum over the blocks in float64, added in the order of the blocks."""
        return self.blocks(name).double().sum(0)


@dataclass(frozen=True)
class Target:
    """One tensor that a rule is built for.

    Attributes:
        name: the tensor's name; random masks are keyed on it.
        shape: the tensor's shape.
        each: the parameters of every member, such as its weight; M of them.
        shared: the parameters of the merge.
        variants: how the rule differs from the form that "compat" names, see ``distmerge.rules.parameters.VARIANTS``.
        dtype: the dtype of the arithmetic.
        seed: the seed of random masks. Across workers it changes with every round.
        embedding: whether its rows belong to tokens, so that each is a vector of its own.
        thresholds: the thresholds of a trim over the whole model, one bit pattern per member, filled in before the merge.
    """

    name: str
    shape: tuple[int, ...]
    each: tuple[dict[str, Any], ...]
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    variants: dict[str, str] = field(default_factory=dict[str, str])
    dtype: torch.dtype = torch.float32
    seed: int = 0
    embedding: bool = False
    thresholds: list[int] = field(default_factory=list[int])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def columns(self) -> int:
        """The length of a row."""
        return max(1, self.shape[-1]) if self.shape else 1


class Rule:
    """A way to merge the members of a block. The base class measures nothing; a subclass implements at least ``merge``.

    A rule declares what it needs, and the code that brings the members together reads the declaration:

    Attributes:
        passes: how often it passes over all blocks of a tensor before it merges. Without passes it is elementwise, up to
            ``unit``: any part of the members gives that part of the result.
        unit: how many elements must stay together in one block, such as those of a row.
        linear: whether the result is a weighted sum with weights that are known beforehand, as an all-reduce computes it.
        needs_base: whether it computes with the base itself, and not with the members' deltas alone. Where it does not, deltas
            as the members without a base give the merged delta.
        least, most: how many members it takes; ``most`` is None where there is no limit.
        exact: whether its tallies are exact in any order of the blocks. Where they hold floats, sums over blocks that were
            cut elsewhere differ by rounding, up to 1e-6 of the result.
        parts: ``(each, across)``, where what concerns one member alone (trimming, masking, rescaling) can be done apart, by
            whoever has the whole member: ``each[m]`` is a rule for member m alone, and ``across`` merges what these rules give.
            None where there is no such part.
    """

    passes: int = 0
    unit: int = 1
    linear: bool = False
    needs_base: bool = False
    least: int = 1
    most: int | None = None
    exact: bool = True

    @property
    def parts(self) -> tuple[list[Rule], Rule] | None:
        return None

    @property
    def coefficients(self) -> Tensor:
        """``[M]``: the factors by which a linear rule multiplies the members' deltas before it adds them up."""
        raise NotImplementedError

    def measure(self, step: int, block: Block, state: Any) -> Measured:
        """Measure one block in pass ``step``; ``state`` is what the previous pass settled."""
        raise NotImplementedError

    def settle(self, step: int, tally: Tally, state: Any) -> Any:
        """Compute the state after pass ``step`` from the measurements of all blocks."""
        raise NotImplementedError

    def merge(self, block: Block, state: Any) -> Tensor:
        """Return the merged block, ``[n]``."""
        raise NotImplementedError

    def hides(self, state: Any) -> bool:
        """Whether a member's element may be left out, so that a NaN in it need not show in the result."""
        return False


def spans(numel: int, unit: int, block: int = BLOCK) -> Iterator[tuple[int, int]]:
    """Start and stop of each block of a tensor."""
    size = max(1, block // unit) * unit
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def cut(rule: Rule, members: list[Tensor], base: Tensor | None = None, block: int = BLOCK) -> list[Block]:
    """Cut tensors in memory, all of one shape, into blocks at places that the rule allows."""
    flat = [member.reshape(-1) for member in members]
    origin = base.reshape(-1) if base is not None else None
    return [
        Block([member[a:b] for member in flat], origin[a:b] if origin is not None else None, a, index)
        for index, (a, b) in enumerate(spans(flat[0].numel(), rule.unit, block))
    ]


def settled_state(rule: Rule, blocks: list[Block]) -> Any:
    """The state after the rule's passes over all blocks of a tensor."""
    state = None
    for step in range(rule.passes if blocks else 0):  # an empty tensor has nothing to measure
        tally = Tally()
        for part in blocks:
            tally.add(part.index, rule.measure(step, part, state))
        state = rule.settle(step, tally, state)
    return state


def run(rule: Rule, members: list[Tensor], base: Tensor | None = None, block: int = BLOCK) -> Tensor:
    """The rule on tensors in memory: ``members`` and ``base`` of one shape, which is the result's."""
    blocks = cut(rule, members, base, block)
    state = settled_state(rule, blocks)
    merged = [rule.merge(part, state) for part in blocks]
    return torch.cat(merged).view(members[0].shape) if merged else members[0].clone()


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a block's elements are summed; the blocks' sums are then added in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def total_norm(tally: Tally, name: str) -> Tensor:
    """The norm over all blocks, float64, from ``name``, each block's norm."""
    return vector_norm(tally.blocks(name).double(), dim=0)


def deltas_to_read(block: Block, dtype: torch.dtype) -> Tensor:
    """``[M, n]``, as :func:`deltas`, of which nothing may be changed: a single delta is not copied."""
    if block.base is None and len(block.members) == 1 and block.members[0].dtype == dtype:
        return block.members[0].unsqueeze(0)
    return deltas(block, dtype)[1]


def deltas(block: Block, dtype: torch.dtype) -> tuple[Tensor | None, Tensor]:
    """``(base [n], delta [M, n])`` in ``dtype``, in memory of its own. Without a base the members are deltas already."""
    base = block.base.to(dtype) if block.base is not None else None
    first = block.members[0]
    delta = torch.empty((len(block.members), first.numel()), dtype=dtype, device=first.device)
    for row, member in zip(delta, block.members, strict=True):
        if base is None:
            row.copy_(member)
        else:
            torch.sub(member.to(dtype), base, out=row)
    return base, delta


def onto(base: Tensor | None, merged: Tensor) -> Tensor:
    """Add the merged delta ``[n]``, whose memory is reused, to the base if there is one."""
    return merged if base is None else merged.add_(base)


def summed(rows: Iterable[Tensor], count: int) -> Tensor:
    """``[n]``: the sum of ``count`` tensors ``[n]`` of one dtype, added up one by one and rounded to that dtype once."""
    total: Tensor | None = None
    dtype: torch.dtype | None = None
    for row in rows:
        if total is None:
            # Two of half precision are added and rounded in one step; more need a wider sum.
            dtype, total = row.dtype, row.to(row.dtype if count <= 2 else wide(row.dtype), copy=True)
        else:
            total.add_(row)
    assert total is not None and dtype is not None
    return total.to(dtype)


LANES = 256
"""Elements of a row in ``folded``. dare.c uses the same number."""


def folded(x: Tensor) -> Tensor:
    """``[M]``: the sums of ``x [M, n]`` in the wide dtype, in an order that does not depend on the machine.

    Rows of LANES elements are added in pairs, their sums in pairs, and so on to one row, whose halves are added likewise.
    """
    x = x.to(wide(x.dtype))
    lacking = -x.shape[1] % LANES
    rows = (pad(x, (0, lacking)) if lacking else x).view(len(x), -1, LANES)
    while rows.shape[1] > 1:
        pairs = rows[:, 0:-1:2] + rows[:, 1::2]
        rows = torch.cat([pairs, rows[:, -1:]], 1) if rows.shape[1] % 2 else pairs
    row = rows.sum(1)  # of one, or of none
    while row.shape[1] > 1:
        half = row.shape[1] // 2
        row = row[:, :half] + row[:, half:]
    return row.squeeze(1)
