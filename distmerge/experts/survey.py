"""The thresholds of a global trim: the k-th largest magnitude of each task vector over the whole model."""

from __future__ import annotations

import torch

from distmerge.errors import UserError
from distmerge.experts.pairing import Pairing
from distmerge.files.header import FLOATS
from distmerge.files.stream import Job
from distmerge.rules.rule import Block, Measured, Tally, deltas
from distmerge.rules.threshold import Cut, histogram, locate, patterns, refine


class ThresholdSurvey:
    """Two passes of histograms over all tensors.

    Attributes:
        thresholds: bit patterns, one for each member; filled in by the last pass.
    """

    passes = 2

    def __init__(self, density: list[float], numel: int):
        self.ranks = [0 if value >= 1 else max(1, int(value * numel)) for value in density]
        self.thresholds: list[int] = []
        self._cuts: list[Cut] = []

    @classmethod
    def of(cls, pairings: list[Pairing]) -> ThresholdSurvey:
        """For the floating point tensors of a plan, whose members must have one density each."""
        floats = [pairing for pairing in pairings if pairing.members[0].stored.dtype in FLOATS]
        found = {tuple(one["density"] for one in pairing.each) for pairing in floats}
        if len(found) != 1:
            raise UserError('trim = "global" takes one density for each model; a gradient or filter needs trim = "tensor"')
        return cls(list(found.pop()), sum(pairing.members[0].stored.numel for pairing in floats))

    def measure(self, step: int, job: Job, block: Block) -> Measured:
        if not block.members[0].is_floating_point():
            return Measured()
        bits = patterns(deltas(block, torch.float32)[1], torch.float32)
        return Measured(added={"counts": histogram(bits, step, 2, [cut.bits for cut in self._cuts])})

    def settle(self, step: int, tally: Tally) -> None:
        counts = tally.added["counts"]
        if step == 0:
            self._cuts = [locate(row, k) if k else Cut(-1, 0, 0) for row, k in zip(counts, self.ranks, strict=True)]
            return
        exact = [refine(cut, row, k).bits if k else 0 for cut, row, k in zip(self._cuts, counts, self.ranks, strict=True)]
        self.thresholds[:] = exact
