"""The loss that merging costs: workers that merge now and then against data parallelism, at the same tokens and global batch.

Each arm is a real ``distmerge train`` run of a byte-level Llama of 0.26M parameters. First a sweep on a seed of its own tunes
each side: data parallelism its learning rate, DiLoCo its inner and outer rates and its momentum. The best of each are judged
on other seeds, with 2 and 4 workers. Then come the studies: few rounds, longer rounds, SPARTA beside DiLoCo, SPARTA's delay.

    python benchmarks/quality.py [--small] [--seeds N] [--out DIR] [--record] [--files GLOB ...]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

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
    mixed,
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
    """Steps of the arms that are judged, of the sweep's, of the runs with few rounds and with delays; and what is swept."""

    steps: int
    sweep_steps: int
    few_steps: int
    delay_steps: int
    data_parallel: tuple[float, ...]
    diloco: tuple[Outer, ...]
    four_workers: tuple[Outer, ...]
    long_rounds: tuple[int, ...]
    delays: tuple[int, ...]


FULL = Size(
    steps=3000,
    sweep_steps=2000,
    few_steps=600,
    delay_steps=1000,
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
    four_workers=(Outer(1e-3, 0.7, 0.5), Outer(1e-3, 1.0, 0.5), Outer(2e-3, 0.7, 0.5), Outer(2e-3, 1.0, 0.5)),
    long_rounds=(50, 200),
    delays=(0, 1, 5, 10, 50),
)
SMALL = Size(
    200, 100, 60, 100, (2e-3,), (Outer(1e-3, 0.7, 0.5), Outer(2e-3, 1.0, 0.0)), (Outer(1e-3, 0.7, 0.5),), (50,), (0, 5)
)

FEW_ROUNDS = ((1.0, 0.0), (0.7, 0.5), (0.5, 0.8), (0.7, 0.9))
"""Outer rates and momenta for the short runs, at the inner rate that was best."""


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


def few_rounds(runs: Runs, size: Size, tuned: Outer) -> dict[str, float]:
    """Gaps of outer settings in runs too short for many rounds, as the quickstart is."""
    arms = [data_parallel(rate, size.few_steps) for rate in size.data_parallel[:3]]
    baseline = min((runs.outcome(arm, [SWEEP_SEED]) for arm in arms), key=lambda outcome: outcome.loss)
    settings = [Outer(tuned.inner_lr, lr, momentum) for lr, momentum in FEW_ROUNDS]
    return {f"{s.lr:g}/{s.momentum:g}": gap(runs.outcome(s.arm(size.few_steps), [SWEEP_SEED]), baseline) for s in settings}


def long_rounds(runs: Runs, size: Size, rate: float, tuned: Outer) -> dict[str, dict[int, float]]:
    """Gaps by H: of the tuned settings, and of plain averaging at the same inner rate."""
    baseline = runs.outcome(data_parallel(rate, size.sweep_steps), [SWEEP_SEED])
    result = {}
    for outer in dict.fromkeys([tuned, Outer(tuned.inner_lr, 1.0, 0.0)]):
        arms = {every: outer.arm(size.sweep_steps, every) for every in (EVERY, *size.long_rounds)}
        result[str(outer)] = {every: gap(runs.outcome(arm, [SWEEP_SEED]), baseline) for every, arm in arms.items()}
    return result


def sparse_and_full(runs: Runs, size: Size, tuned: Outer, seeds: list[int]) -> dict[str, list[float]]:
    """Losses of DiLoCo at H, at 10 H, and at 10 H with SPARTA at each step in between."""
    every, steps = 10 * EVERY, size.sweep_steps
    full = {"kind": "diloco", "every": every, "outer_lr": tuned.lr, "outer_momentum": tuned.momentum}
    sparse = {"kind": "sparta", "fraction": 0.005}
    both = mixed(f"sparta+{tuned.arm(steps, every).name}", tuned.inner_lr, steps, sparse, full)
    arms = {f"DiLoCo, H = {EVERY}": tuned.arm(steps), f"DiLoCo, H = {every}": tuned.arm(steps, every)}
    arms[f"SPARTA + DiLoCo, H = {every}"] = both
    return {name: runs.outcome(arm, seeds).losses for name, arm in arms.items()}


def delays(runs: Runs, size: Size, tuned: Outer) -> dict[str, float]:
    """Losses of SPARTA by its delay in steps, beside workers that don't communicate until the end."""
    seeds, steps, lr = [SWEEP_SEED], size.delay_steps, tuned.inner_lr
    result = {}
    for delay in size.delays:
        sparse = {"kind": "sparta", "fraction": 0.005, "delay": delay}
        result[f"delay {delay}"] = runs.outcome(mixed(f"sparta-lr{lr:g}-delay{delay}", lr, steps, sparse), seeds).loss
    result["no communication"] = runs.outcome(mixed(f"none-lr{lr:g}", lr, steps, {"kind": "none"}), seeds).loss
    return result


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
    tuned = by_workers[2]
    baseline = runs.outcome(data_parallel(lr, size.steps), seeds)
    judged = {w: runs.outcome(best.arm(size.steps, workers=w), seeds) for w, best in by_workers.items()}
    studies: dict[str, Any] = {
        "few rounds": few_rounds(runs, size, tuned),
        "long rounds": long_rounds(runs, size, lr, tuned),
        "SPARTA and DiLoCo": sparse_and_full(runs, size, tuned, [SWEEP_SEED, *seeds[1:]]),
        "SPARTA's delay": delays(runs, size, tuned),
    }
    named = {f"DiLoCo, {workers} workers": outcome for workers, outcome in judged.items()}
    report.data |= studies | {
        "model": MODEL,
        "tokens": size.steps * GLOBAL_BATCH * SEQUENCE_LENGTH,
        "rounds": size.steps // EVERY,
        "losses": {name: outcome.losses for name, outcome in runs.outcomes.items()},
        "training_seconds": round(sum(sum(outcome.seconds) for outcome in runs.outcomes.values())),
        "gap": {name: gap(outcome, baseline) for name, outcome in named.items()},
        "gap_on_the_way": {name: gap_on_the_way(outcome, baseline) for name, outcome in named.items()},
    }
    judge(report, baseline, judged)
    quality_plots.draw(report, baseline, named, EVERY)
    report.finish()


if __name__ == "__main__":
    main()
