"""The loss that merging costs: workers that merge now and then against data parallelism, at the same tokens and global batch.

Each arm is a real ``distmerge train`` run of a byte-level Llama of 0.26M parameters. First a sweep on a seed of its own tunes
each side: data parallelism its learning rate, DiLoCo its inner and outer rates and its momentum. The best of each are judged
on other seeds, with 2 and 4 workers.

    python benchmarks/quality.py [--small] [--seeds N] [--out DIR] [--record] [--files GLOB ...]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import quality_plots
from arms import (
    EVERY,
    GLOBAL_BATCH,
    MODEL,
    SEQUENCE_LENGTH,
    Arm,
    Outcome,
    Runs,
    data_parallel,
    diloco,
    gap,
    gap_on_the_way,
)
from report import Report, parser

SWEEP_SEED = 100  # the bars are judged on seeds 0, 1, ...


class Outer(NamedTuple):
    """What is tuned in DiLoCo."""

    inner_lr: float
    lr: float
    momentum: float

    def __str__(self) -> str:
        return f"inner {self.inner_lr:g}, outer {self.lr:g}/{self.momentum:g}"

    def arm(self, steps: int, every: int = EVERY, workers: int = 2) -> Arm:
        return diloco(self.inner_lr, steps, self.lr, self.momentum, every, workers)


@dataclass(frozen=True)
class Size:
    """Steps of the arms that are judged and of the sweep's, and what is swept."""

    steps: int
    sweep_steps: int
    data_parallel: tuple[float, ...]
    diloco: tuple[Outer, ...]
    four_workers: tuple[Outer, ...]


FULL = Size(
    steps=5000,
    sweep_steps=2000,
    data_parallel=(1e-3, 2e-3, 4e-3, 8e-3),
    diloco=(
        Outer(1e-3, 1.0, 0.0),
        Outer(1e-3, 0.7, 0.5),
        Outer(1e-3, 0.5, 0.8),
        Outer(2e-3, 1.0, 0.0),
        Outer(2e-3, 0.7, 0.5),
        Outer(2e-3, 0.7, 0.9),
        Outer(4e-3, 0.7, 0.5),
    ),
    four_workers=(
        Outer(1e-3, 0.7, 0.5),
        Outer(1e-3, 1.0, 0.5),
        Outer(1e-3, 1.4, 0.5),
        Outer(1e-3, 1.0, 0.7),
        Outer(2e-3, 0.7, 0.5),
        Outer(2e-3, 1.0, 0.5),
    ),
)
SMALL = Size(200, 100, (2e-3,), (Outer(1e-3, 0.7, 0.5), Outer(2e-3, 1.0, 0.0)), (Outer(1e-3, 0.7, 0.5),))


def sweep(runs: Runs, size: Size) -> tuple[float, dict[int, Outer]]:
    """The best learning rate of data parallelism; the best rates and momentum of DiLoCo, by the number of workers."""
    seeds, steps = [SWEEP_SEED], size.sweep_steps
    by_rate = {rate: runs.outcome(data_parallel(rate, steps), seeds).loss for rate in size.data_parallel}
    swept = {2: size.diloco, 4: size.four_workers}
    by_outer = {m: {s: runs.outcome(s.arm(steps, workers=m), seeds).loss for s in settings} for m, settings in swept.items()}
    rate = min(by_rate, key=by_rate.__getitem__)
    tuned = {workers: min(losses, key=losses.__getitem__) for workers, losses in by_outer.items()}
    runs.report.data["sweep"] = {
        "seed": SWEEP_SEED,
        "steps": steps,
        "rounds": steps // EVERY,
        "data parallelism": {f"{lr:g}": loss for lr, loss in by_rate.items()},
        "diloco": {
            workers: {str(settings): {"loss": loss, "gap": loss / by_rate[rate] - 1} for settings, loss in losses.items()}
            for workers, losses in by_outer.items()
        },
        "best": {"data parallelism": rate} | {f"{workers} workers": str(settings) for workers, settings in tuned.items()},
    }
    return rate, tuned


def judge(report: Report, baseline: Outcome, arms: dict[int, Outcome]) -> None:
    """The bars, by the number of workers."""
    for workers, limit in ((2, 0.02), (4, 0.03)):
        claim = f"loss of {workers} DiLoCo workers above data parallelism's, relative, mean over seeds"
        report.bar(claim, gap(arms[workers], baseline), "<=", limit, quality=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--files", nargs="+", default=[], metavar="GLOB", help="other text than the standard library's")
    options = arguments.parse_args()
    report, size = Report("quality", options), SMALL if options.small else FULL
    runs, seeds = Runs(report, options.files), list(range(options.seeds))
    lr, by_workers = sweep(runs, size)
    baseline = runs.outcome(data_parallel(lr, size.steps), seeds)
    judged = {w: runs.outcome(best.arm(size.steps, workers=w), seeds) for w, best in by_workers.items()}
    named = {f"DiLoCo, {workers} workers": outcome for workers, outcome in judged.items()}
    report.data |= {
        "model": MODEL,
        "tokens": size.steps * GLOBAL_BATCH * SEQUENCE_LENGTH,
        "rounds": size.steps // EVERY,
        "losses": {name: outcome.losses for name, outcome in runs.outcomes.items()},
        "training_seconds": round(sum(sum(outcome.seconds) for outcome in runs.outcomes.values())),
        "gap": {name: gap(outcome, baseline) for name, outcome in named.items()},
        "gap_on_the_way": {name: gap_on_the_way(outcome, baseline) for name, outcome in named.items()},
    }
    judge(report, baseline, judged)
    quality_plots.draw(report, baseline, named)
    report.finish()


if __name__ == "__main__":
    main()
