"""What a merge reports, and how far apart the workers were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.theta.flat import FlatParameters
from distmerge.workers.group import WorkerGroup


@dataclass(frozen=True)
class MergeReport:
    """One merge, of all parameters or of one fragment.

    Attributes:
        round: merges done by this merger, this one included.
        steps: inner steps since the same parameters were last merged.
        divergence: ``mean_m |delta_m - d|^2`` over the merged parameters; NaN where a worker that counts is not finite; None
            where it is not measured.
        rule, because: by which rule the deltas were merged: the merger's own, or "mean" where it had too few members or chose
            so; and why, where there was a choice.
        correlation: the mean cosine between two workers' deltas (as if of equal norms); None without a whole anchor.
        bytes_sent: what left this rank for it.
        seconds: what the merge took of this rank's time, waiting included.
        wait_seconds: what this rank was blocked for its peers and the network.
        left_out: whether this worker's own values were not finite and did not count (``nonfinite = "leave-out"``). It has the
            others' now, but its optimizer's moments are as they were: reset them.
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
    """How far apart the workers are, from scalars alone: one small collective, in float64.

    With ``own`` = |delta_m|^2 and ``merged`` = |mean delta|^2 the divergence is ``mean own - merged``; on deltas, since on raw
    weights the difference would cancel. Any point c that all know serves as the anchor: where a worker holds no whole anchor, c
    is what the merge gave, and only then are these scalars known. Where a rule is run at the owners, they measure both on the
    rows that they got, since what the rule gives need not be the mean.

    Attributes:
        rule, because: by which rule the deltas were merged, and why where there was a choice.
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
        """A part of the mean delta that every worker adds."""
        self.merged += square(x)

    def add_merged_share(self, x: Tensor) -> None:
        """A part of the mean delta that this worker alone adds."""
        self.merged_share += square(x)

    def add_rows(self, own: Tensor, merged: Tensor, members: int) -> None:
        """What the owner of a share measured on the rows of all ``members``: their mean square norm, and their mean's."""
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
        weights, own, share, *own_share = self.sums.tolist()
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
        for name in ("merged", "merged_share", "own_share"):
            getattr(self, name).copy_(state[name])
        self.members, self.rule, self.because = state["members"], state["rule"], state["because"]
        self.sums = None if state["sums"] is None else state["sums"].to(self.merged.device)


def square(x: Tensor) -> Tensor:
    """``|x|^2`` as a float64 scalar. Inside a piece the sum is float32's: a float64 norm converts each element, and costs
    more than the outer step."""
    return torch.dot(x, x).double()
