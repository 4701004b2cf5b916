"""Finds the thresholds of a global trim: the k-th largest magnitude of each task vector over the whole model."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.files.header import FLOATS
from distmerge.files.stream import Job
from distmerge.merging.pairing import Pairing
from distmerge.rules.protocol import Block, Measured, Tally, deltas
from distmerge.rules.threshold import COARSE, LOW_BITS, histogram, locate, patterns, within
from distmerge.rules.torch_typed import to_list

SAMPLE = 64
"""The sample that precedes the full pass reads the first 1/SAMPLE of the elements of every block."""

WINDOW = 3
"""How many bins of the coarse histogram, each 0.8% wide, the full pass counts exactly."""


class ThresholdSurvey:
    """Finds the threshold of each member in two passes, or rarely four.

    A sample shows roughly where each threshold lies; one pass over all tensors then counts exactly in a window around that
    place. If a threshold lies outside its window, two more passes follow: a histogram of all elements, then the right window.

    Args:
        density: the share of its elements that each member keeps.

    Attributes:
        thresholds: as bit patterns, one for each member; filled in by the last pass.
    """

    def __init__(self, density: list[float]):
        self.density = density
        self.thresholds: list[int] = []
        self._lows: list[int] | None = None
        self._sampling = True

    @classmethod
    def of(cls, pairings: list[Pairing]) -> ThresholdSurvey:
        """The survey for the floating point tensors of a merge.

        Raises:
            UserError: when a member's density is not the same for all of them.
        """
        floats = [pairing for pairing in pairings if pairing.members[0].stored.dtype in FLOATS]
        found = {tuple(one["density"] for one in pairing.each) for pairing in floats}
        if len(found) != 1:
            raise UserError('trim = "global" takes one density for each model; gradients and filters need trim = "tensor"')
        return cls(list(found.pop()))

    def measure(self, job: Job, block: Block) -> Measured:
        if not block.members[0].is_floating_point():
            return Measured()
        if self._lows is not None:
            above, counts = within(self._patterns(block), self._lows, WINDOW)
            return Measured(added={"above": above, "counts": counts, "numel": torch.tensor(len(block.members[0]))})
        if self._sampling:
            share = -(-len(block.members[0]) // SAMPLE)
            assert block.base is not None
            block = replace(block, members=[member[:share] for member in block.members], base=block.base[:share])
        return Measured(added={"counts": histogram(self._patterns(block), 0, 2, [])})

    def _patterns(self, block: Block) -> Tensor:
        return patterns(deltas(block, torch.float32)[1], torch.float32)

    def settle(self, tally: Tally) -> bool:
        """End a pass. Returns whether the thresholds are known; if not, another pass is needed."""
        counts = tally.added["counts"]
        if self._lows is None:
            bins = [locate(row, self._rank(one, int(row.sum()))).bits for row, one in zip(counts, self.density, strict=True)]
            self._lows = [min(max(0, bin - WINDOW // 2), COARSE - WINDOW) for bin in bins]
            return False
        found: list[int] = []
        for row, above, low, one in zip(counts, to_list(tally.added["above"]), self._lows, self.density, strict=True):
            k = self._rank(one, int(tally.added["numel"]))
            if not above < k <= above + int(row.sum()):
                self._lows, self._sampling = None, False
                return False
            found.append((low << LOW_BITS) + locate(row, k, above).bits)
        self.thresholds[:] = found
        return True

    def _rank(self, density: float, numel: int) -> int:
        return max(1, int(density * numel))
