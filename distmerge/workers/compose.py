"""Several mergers of one model that are used as one. Each acts at its own steps, in the order in which they are given."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from distmerge.errors import UserError
from distmerge.workers.divergence import MergeReport
from distmerge.workers.merger import Merger


class Composed:
    """The result of :func:`compose`, which is used like a merger.

    Attributes:
        mergers: in the order in which they act.
    """

    def __init__(self, mergers: tuple[Merger, ...]):
        self.mergers = mergers

    def step(self, tokens: float | Tensor = 1.0) -> list[MergeReport]:
        """Count one inner step; the reports of the merges that were due."""
        return [report for merger in self.mergers if (report := merger.step(tokens))]

    def finish(self) -> list[MergeReport]:
        """Finish all mergers, so that all workers end with the same bits."""
        return [report for merger in self.mergers if (report := merger.finish())]

    def due(self) -> bool:
        """Whether the next step sends something."""
        return any(merger.due() for merger in self.mergers)

    @property
    def bytes_sent(self) -> float:
        """Bytes that this rank has sent for merging since the start."""
        return sum(merger.bytes_sent for merger in self.mergers)

    def state_dict(self) -> dict[str, Any]:
        """All that later merges depend on besides the parameters."""
        return {"mergers": [merger.state_dict() for merger in self.mergers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for merger, theirs in zip(self.mergers, state["mergers"], strict=True):
            merger.load_state_dict(theirs)


def compose(*mergers: Merger) -> Composed:
    """Join mergers of one model, for example to merge a few parameters often and all of them rarely.

        merger = dm.compose(dm.SPARTA(model, fraction=0.005), dm.DiLoCo(model, every=200))

    Raises:
        UserError: for none, or for mergers of different models.
    """
    if not mergers:
        raise UserError("compose must be given at least one merger, got none")
    if any(merger.flat.model is not mergers[0].flat.model for merger in mergers):
        raise UserError("compose must be given mergers of one model, got mergers of several")
    return Composed(mergers)
