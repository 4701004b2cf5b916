"""Previews: the loss of the merged window while training goes on, as the loss that annealing would reach.

The run is not disturbed by a bit: theta is put back from a copy, the evaluation leaves the model's mode and every generator
as they were.
"""

from __future__ import annotations

from collections.abc import Callable

from distmerge import config
from distmerge.checkpoints.curves import weights
from distmerge.checkpoints.window import Window
from distmerge.errors import UserError
from distmerge.flat import FlatParameters


class Preview:
    """Evaluates the merge of the newest blocks.

    Args:
        evaluate: the loss of the model as it stands; a collective.

    Raises:
        UserError: for an unknown curve.
    """

    def __init__(self, section: config.Preview, window: Window, flat: FlatParameters, evaluate: Callable[[], float]):
        self.section, self.window, self.flat, self.evaluate = section, window, flat, evaluate
        try:
            weights(section.curve, [0.0, 0.5])
        except UserError as error:
            raise UserError(f"config.preview.curve: {error}") from None

    def loss(self) -> float | None:
        """The loss of the merged window; None while it has fewer than two blocks."""
        blocks = self.window.mergeable(self.section.last)
        if len(blocks) < 2:
            return None
        with self.flat.borrowed():
            self.window.merge_into(self.flat, self.section.curve, blocks)
            return self.evaluate()
