"""Previews: the loss of the merged window while training goes on, as the loss that annealing would reach.

The run is not disturbed by a bit: theta is put back from a copy, the evaluation leaves the model's mode and every generator
as they were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from distmerge.config import train as config
from distmerge.errors import UserError
from distmerge.rundir.identity import stranger
from distmerge.theta.flat import FlatParameters
from distmerge.windows.blocks import RECORD, Block, intact
from distmerge.windows.curves import weights
from distmerge.windows.window import Window


class Preview:
    """Evaluates the merge of the newest blocks.

    Args:
        evaluate: the loss of the model as it stands; a collective.

    Raises:
        UserError: for an unknown curve.
    """

    def __init__(self, section: config.PreviewSettings, window: Window, flat: FlatParameters, evaluate: Callable[[], float]):
        self.section, self.window, self.flat, self.evaluate = section, window, flat, evaluate
        try:
            weights(section.curve, [0.0, 0.5])
        except UserError as error:
            raise UserError(f"config.preview.curve: {error}") from None

    def loss(self, step: int) -> float | None:
        """The loss of the merged window at ``step``; None while it has fewer than two blocks."""
        blocks = self._sound_blocks(step)
        if len(blocks) < 2:
            return None
        with self.flat.borrowed():
            self.window.merge_into(self.flat, self.section.curve, blocks)
            return self.evaluate()

    def _sound_blocks(self, step: int) -> list[Block]:
        """The newest mergeable blocks that are still what was published; a collective.

        One that vanished, or is damaged, is forgotten, and the record says so. Its files are read anyway where it is merged,
        and their XXH128 costs a tenth of that.
        """
        window, sound = self.window, []
        while left := [block for block in window.mergeable(self.section.last) if block not in sound]:
            block = left[-1]
            problem = self._problem(block)
            if problem is None:
                sound.append(block)
            else:  # an older one may take its place
                window.blocks.remove(block)
                window.tell(step, "block left out", {"block": block.name, "reason": problem})
        return window.mergeable(self.section.last)

    def _problem(self, block: Block) -> str | None:
        """What is wrong with a block on disk, whichever rank found it."""
        window, path = self.window, self.window.root / block.name
        if window.section.store == "memory":
            return None
        problems: list[str | None] = [None] * window.mesh.world
        problem = intact(path, window.mesh.rank, window.mesh.world) or stranger(path, window.identity, RECORD)
        dist.all_gather_object(problems, problem)
        return next((said for said in problems if said), None)
