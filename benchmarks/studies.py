"""How the loss that merging costs depends on rounds, H and the outer settings; SPARTA beside DiLoCo; SPARTA's delay.

The same runs as quality.py's, at the settings that its sweep found best, for which it must have been recorded. Nothing here is
a bar: what comes out is in the record and the picture.

    python benchmarks/studies.py [--small] [--out DIR] [--record] [--files GLOB ...]
"""

from __future__ import annotations

from dataclasses import dataclass

import quality_plots
from arms import EVERY, Runs, data_parallel, gap, mixed
from quality import SWEEP_SEED, Outer
from report import Report, parser

RATE = 4e-3
"""Data parallelism's best learning rate in quality.py's sweep."""
TUNED = Outer(1e-3, 0.7, 0.5)
"""The best setting of two workers there."""
FEW_ROUNDS = ((1.0, 0.0), (0.7, 0.5), (0.5, 0.8), (0.7, 0.9))
"""Outer rates and momenta for short runs."""


@dataclass(frozen=True)
class Size:
    """Steps, rounds and delays."""

    steps: int
    few_steps: int
    delay_steps: int
    rates: tuple[float, ...]
    long_rounds: tuple[int, ...]
    delays: tuple[int, ...]
    seeds: tuple[int, ...]


FULL = Size(2000, 600, 1000, (1e-3, 2e-3, 4e-3), (50, 200), (0, 1, 5, 10, 50), (SWEEP_SEED, SWEEP_SEED + 1))
SMALL = Size(100, 60, 60, (2e-3,), (50,), (0, 5), (SWEEP_SEED,))


def few_rounds(runs: Runs, size: Size) -> dict[str, float]:
    """Gaps of outer settings in runs too short for many rounds, as the quickstart is."""
    arms = [data_parallel(rate, size.few_steps) for rate in size.rates]
    baseline = min((runs.outcome(arm, [SWEEP_SEED]) for arm in arms), key=lambda outcome: outcome.loss)
    settings = [Outer(TUNED.inner_lr, lr, momentum) for lr, momentum in FEW_ROUNDS]
    return {f"{s.lr:g}/{s.momentum:g}": gap(runs.outcome(s.arm(size.few_steps), [SWEEP_SEED]), baseline) for s in settings}


def long_rounds(runs: Runs, size: Size) -> dict[str, dict[int, float]]:
    """Gaps by H: of the tuned settings, and of plain averaging at the same inner rate."""
    baseline = runs.outcome(data_parallel(RATE, size.steps), [SWEEP_SEED])
    result = {}
    for outer in (TUNED, Outer(TUNED.inner_lr, 1.0, 0.0)):
        arms = {every: outer.arm(size.steps, every) for every in (EVERY, *size.long_rounds)}
        result[str(outer)] = {every: gap(runs.outcome(arm, [SWEEP_SEED]), baseline) for every, arm in arms.items()}
    return result


def sparse_and_full(runs: Runs, size: Size) -> dict[str, list[float]]:
    """Losses of DiLoCo at H, at 10 H, and at 10 H with SPARTA at each step in between."""
    every, steps = 10 * EVERY, size.steps
    full = {"kind": "diloco", "every": every, "outer_lr": TUNED.lr, "outer_momentum": TUNED.momentum}
    sparse = {"kind": "sparta", "fraction": 0.005}
    both = mixed(f"sparta+{TUNED.arm(steps, every).name}", TUNED.inner_lr, steps, sparse, full)
    arms = {f"DiLoCo, H = {EVERY}": TUNED.arm(steps), f"DiLoCo, H = {every}": TUNED.arm(steps, every)}
    arms[f"SPARTA + DiLoCo, H = {every}"] = both
    return {name: runs.outcome(arm, list(size.seeds)).losses for name, arm in arms.items()}


def delays(runs: Runs, size: Size) -> dict[str, float]:
    """Losses of SPARTA by its delay in steps, beside workers that don't communicate until the end."""
    steps, lr = size.delay_steps, TUNED.inner_lr
    result = {}
    for delay in size.delays:
        sparse = {"kind": "sparta", "fraction": 0.005, "delay": delay}
        result[f"delay {delay}"] = runs.outcome(mixed(f"sparta-lr{lr:g}-delay{delay}", lr, steps, sparse), [SWEEP_SEED]).loss
    result["no communication"] = runs.outcome(mixed(f"none-lr{lr:g}", lr, steps, {"kind": "none"}), [SWEEP_SEED]).loss
    return result


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--files", nargs="+", default=[], metavar="GLOB", help="other text than the standard library's")
    options = arguments.parse_args()
    report, size = Report("studies", options), SMALL if options.small else FULL
    runs = Runs(report, options.files)
    report.data["few rounds"] = few_rounds(runs, size)
    report.data["long rounds"] = long_rounds(runs, size)
    report.data["SPARTA and DiLoCo"] = sparse_and_full(runs, size)
    report.data["SPARTA's delay"] = delays(runs, size)
    report.data["losses"] = {name: outcome.losses for name, outcome in runs.outcomes.items()}
    quality_plots.draw_studies(report)
    report.finish()


if __name__ == "__main__":
    main()
