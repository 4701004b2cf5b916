"""What a merger is: the protocol that the trainer, windows, recovery and :func:`~distmerge.workers.compose.compose` rely on.

A merger of your own is a class with these members. One that subclasses :class:`Merger` inherits those that have a default, and
writes ``step``, ``due`` and ``finish``:

    class Gossip(dm.Merger):
        def __init__(self, flat, group=None, every=10): ...

In a configuration it is named by its module, ``kind = "my_module:Gossip"``, and made as ``Gossip(flat, group=..., **keys)``
with the other keys of its table.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from distmerge.errors import UserError
from distmerge.theta.flat import FlatParameters
from distmerge.workers.divergence import MergeReport


@runtime_checkable
class Merger(Protocol):
    """Merges the parameters of this worker with those of the others, at steps that are the same on all of them.

    Attributes:
        flat: the parameters that it merges, ``flat.vector`` of shape ``[n]`` in float32. Call ``flat.pull()`` before reading
            the vector and ``flat.push()`` after writing it.
        weight: this worker's weight in the next merges. Recovery sets it to 0 while the worker's values can't be trusted: the
            worker then takes part in all collectives without counting, and takes the others' result.
        round: merges begun so far. A window adds the anchor whenever this number has changed.
        every: inner steps between merges of a parameter. No block of a window may be shorter where there is an anchor.
    """

    flat: FlatParameters
    weight: float = 1.0
    round: int = 0
    every: int = 1

    @abstractmethod
    def step(self, tokens: float | Tensor = 1.0) -> MergeReport | None:
        """Count one inner step and merge what is due. Called by all workers after every optimizer step.

        Args:
            tokens: how many counted in this worker's loss, over all of its ranks and micro steps. It may be a scalar on the
                device, since reading it there would wait for the step.

        Returns:
            the merge that ended at this step, if there was one.
        """
        ...

    @abstractmethod
    def due(self) -> bool:
        """Whether the next step sends something. Recovery then lets the workers agree, before that step's merge, on who
        counts."""
        ...

    @abstractmethod
    def finish(self) -> MergeReport | None:
        """End the training: complete or drop what is in flight, and leave all workers with the same parameters."""
        ...

    def restart(self) -> None:
        """Make the present parameters, which all workers now have, the shared ones, and drop what is in flight. All workers
        call it at the same step, after a roll-back and before the final evaluation."""

    def start_again(self) -> None:
        """Forget what was remembered of this worker's old parameters. Called when this worker alone was given new ones."""

    @property
    def anchor(self) -> Tensor | None:
        """What the workers share, ``[n]`` in the layout of ``flat.vector``; None if they share only the parameters
        themselves. Evaluations, windows and workers that start again read it."""
        return None

    @property
    def bytes_sent(self) -> float:
        """Bytes that this rank has sent for merging since the start of the run."""
        return 0.0

    @property
    def collectives(self) -> int:
        """Collective operations that this rank took part in for merging since the start of the run."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """All that later merges depend on besides the parameters; part of every checkpoint. It holds only plain values and
        tensors, since a checkpoint is read without running code."""
        return {"round": self.round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where ``state`` was taken. The trainer restores the parameters."""
        self.round = state["round"]


MEMBERS = sorted({*Merger.__annotations__, *(name for name in vars(Merger) if not name.startswith("_"))})
"""The names of all members."""


def check_merger(made: object, what: str) -> Merger:
    """``made``, as a merger.

    Args:
        what: how the error names it.

    Raises:
        UserError: naming the members that it lacks.
    """
    if not isinstance(made, Merger):
        missing = [name for name in MEMBERS if not hasattr(made, name)]
        raise UserError(f"{what} must be a merger (see distmerge.Merger), but it has no {', '.join(missing)}")
    return made
