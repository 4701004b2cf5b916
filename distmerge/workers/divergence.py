"""The report of a merge, and the divergence of the workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.theta.flat import FlatParameters
from distmerge.workers.collectives import floats
from distmerge.workers.group import WorkerGroup
from distmerge.workers.saved import check_keys


@dataclass(frozen=True)
class MergeReport:
    """One merge, of all parameters or of one fragment.

    Attributes:
        round: merges done by this merger, this one included.
        steps: inner steps since the same parameters were last merged.
        divergence: ``mean_m |delta_m - d|^2`` over the merged parameters; NaN if a worker that counts is not finite; None if
            it is not measured.
        rule, because: the rule that merged the deltas, and the reason if there was a choice. The rule is the merger's own, or
            "mean" if too few members counted or the automatic choice took it.
        correlation: the mean cosine between two workers' deltas (computed as if their norms were equal); None without a
            whole anchor.
        bytes_sent: bytes that this rank sent for it.
        seconds: time that this rank spent on the merge, waiting included.
        wait_seconds: time that this rank was blocked, waiting for other workers and the network.
        left_out: whether this worker's own values were left out because they were not finite (``nonfinite = "leave-out"``). It
            now has the others' values, but its optimizer's moments are unchanged and should be reset.
    """

    round: int
    steps: int
    divergence: float | None
    correlation: float | None
    collectives: int
    bytes_sent: float
    seconds: float
    wait_seconds: float
    left_out: bool = False
    rule: str = "mean"
    because: str | None = None


class Divergence:
    """How far apart the workers are, computed from scalars in float64 with one small collective.

    With ``own`` = |delta_m|^2 and ``merged`` = |mean delta|^2 the divergence is ``mean own - merged``. It is taken of deltas,
    because the difference would cancel on raw weights. Any point c that all workers know can serve as the anchor. Where no
    worker holds a whole anchor, c is the result of the merge, so the scalars are known only after it. Where owners run a
    rule, they measure both scalars on the rows that they received, since the rule's result need not be the mean.

    Attributes:
        rule, because: the rule that merged the deltas, and the reason if there was a choice.
    """

    def __init__(self, device: torch.device):
        self.own = torch.zeros((), dtype=torch.float64, device=device)
        self.merged = torch.zeros((), dtype=torch.float64, device=device)
        self.merged_share = torch.zeros((), dtype=torch.float64, device=device)
        self.own_share = torch.zeros((), dtype=torch.float64, device=device)
        self.rule = "mean"
        self.because: str | None = None
        self.members: int | None = None
        self.sums: Tensor | None = None
        self._work: dist.Work | None = None

    def add_own(self, x: Tensor) -> None:
        self.own += square(x)

    def add_merged(self, x: Tensor) -> None:
        """Add a part of the mean delta that every worker holds and adds."""
        self.merged += square(x)

    def add_merged_share(self, x: Tensor) -> None:
        """Add a part of the mean delta that only this worker adds."""
        self.merged_share += square(x)

    def add_rows(self, own: Tensor, merged: Tensor, members: int) -> None:
        """Add what a share's owner measured on the rows of all ``members``: their mean square norm and that of their mean."""
        self.own_share += own
        self.merged_share += merged
        self.members = members

    def begin(self, workers: WorkerGroup, flat: FlatParameters, weight: float) -> None:
        """Send this worker's scalars; ``own`` must be complete."""
        measured = [self.own, self.merged_share] if self.members is None else [self.own, self.merged_share, self.own_share]
        sums = torch.stack(measured)
        flat.sum_over_shards(sums)
        factors = torch.tensor([weight, 1.0, 1.0][: len(sums)]).to(sums)
        self.sums = torch.cat([torch.tensor([weight]).to(sums), sums * factors])
        self._work = workers.begin_total(self.sums)

    def finish(self, workers: WorkerGroup, flat: FlatParameters, weight: float, anchored: bool) -> tuple[float, float | None]:
        """Divergence and mean correlation."""
        if self.sums is None:
            self.begin(workers, flat, weight)
        self.wait()
        assert self.sums is not None
        merged = self.merged.reshape(1)
        flat.sum_over_shards(merged)
        weights, own, share, *own_share = floats(self.sums)
        own, merged = own / weights + sum(own_share), merged.item() + share
        # |d|^2 = own / M + (M - 1) / M * correlation * own, for M equal weights
        size = self.members or workers.size
        correlation = (size * merged / own - 1) / (size - 1) if anchored and size > 1 and own > 0 else None
        difference = own - merged
        return 0.0 if difference < 0 else difference, correlation  # max() would make 0 of NaN

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
            self._work = None

    def state_dict(self) -> dict[str, Any]:
        self.wait()
        return {
            "merged": self.merged,
            "merged_share": self.merged_share,
            "own_share": self.own_share,
            "members": self.members,
            "rule": self.rule,
            "because": self.because,
            "sums": self.sums,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        summed = ("merged", "merged_share", "own_share")
        check_keys(state, (*summed, "members", "rule", "because", "sums"), "the divergence of a fragment in flight")
        for name in summed:
            getattr(self, name).copy_(state[name])
        self.members, self.rule, self.because = state["members"], state["rule"], state["because"]
        self.sums = None if state["sums"] is None else state["sums"].to(self.merged.device)


def square(x: Tensor) -> Tensor:
    """``|x|^2`` as a float64 scalar. Within a piece the sum is in float32, because a float64 norm converts every element and
    would cost more than the outer step."""
    return torch.dot(x, x).double()
