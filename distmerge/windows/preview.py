"""Previews: the loss of the merged window during training, as an estimate of the loss that annealing would reach.

Training is bitwise the same with and without previews: theta is restored from a copy, and the evaluation leaves the model's
mode and all random generators as they were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist

from distmerge.config import train as config
from distmerge.errors import UserError
from distmerge.rundir.identity import identity_problem
from distmerge.theta.flat import FlatParameters
from distmerge.windows.blocks import RECORD, Block, verify_block
from distmerge.windows.curves import weights
from distmerge.windows.window import Window


class Preview:
    """Evaluates the merge of the newest blocks.

    Args:
        flat: the parameters that the merge replaces while it is evaluated.
        evaluate: the loss with the model's present parameters; a collective.

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
        """The loss of the merged window at ``step``; None if fewer than two blocks can be merged. A collective."""
        blocks = self._valid_blocks(step)
        if len(blocks) < 2:
            return None
        with self.flat.borrowed():
            self.window.merge_into(self.flat, self.section.curve, blocks)
            return self.evaluate()

    def _valid_blocks(self, step: int) -> list[Block]:
        """The newest mergeable blocks that still verify. A collective.

        Blocks that are missing or damaged are removed from the window and reported as events. To verify a block is cheap: its
        files are read for the merge anyway, and hashing them with XXH128 takes a tenth of that time.
        """
        window, valid = self.window, []
        while left := [block for block in window.mergeable(self.section.last) if block not in valid]:
            block = left[-1]
            problem = self._problem(block)
            if problem is None:
                valid.append(block)
            else:  # the loop continues, since an older block may take its place
                window.blocks.remove(block)
                window.tell(step, "block left out", {"block": block.name, "reason": problem})
        return window.mergeable(self.section.last)

    def _problem(self, block: Block) -> str | None:
        """What any rank found wrong with a block on disk; None if nothing. A collective."""
        window, path = self.window, self.window.root / block.name
        if window.section.store == "memory":
            return None
        problems: list[str | None] = [None] * window.mesh.world
        problem = verify_block(path, window.mesh.rank, window.mesh.world) or identity_problem(path, window.identity, RECORD)
        dist.all_gather_object(problems, problem)
        return next((said for said in problems if said), None)
