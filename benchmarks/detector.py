"""The detector of spikes: false alarms on healthy runs, delays on faults, divergences that are missed.

Healthy runs are simulated (``detector_families.py``: 14 families) and real (``detector_traces.py``: 36 clean runs, whose losses
and gradient norms are kept in records/detector-traces.npz). An alarm is a verdict of "diverged", which would cost a
roll-back; after one the detector is told to accept, as by a run whose attempts are used up. Delays are judged at "suspected",
where commits are held back; what share of healthy steps that is, is a bar, too. The detector has its default settings.

    python benchmarks/detector.py [--small] [--seeds N] [--first-seed S] [--record-traces] [--out DIR] [--record]
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
from detector_families import (
    BACKGROUNDS,
    DIVERGENCES,
    FAULT_AT,
    FAULTS,
    HEALTHY,
    JUDGING,
    Trace,
    diverging,
    faulty,
    steady,
)  # fmt: skip
from detector_traces import FAULT_AT as REAL_FAULT_AT
from detector_traces import clean_runs, record, recorded, sick_runs
from report import RECORDS, Report, parser

from distmerge.config.checkpoints import RecoverySettings
from distmerge.recovery.detector import LIMIT, Detector, Verdict

TRACES = RECORDS / "detector-traces.npz"

EVENTFUL = ("spikes", "constant_batches")
"""Families in which suspicion is right: something is wrong for some steps, and heals by itself."""

REAL_SOON = ("rate x10 for 10", "rate x30", "random for 3", "random for good", "constant for 30")
"""Real faults that are in the loss within a step or two."""

REAL_DIVERGENCES = ("random for good", "rate ramp")
"""Real faults that end above the start's loss or in what is not finite."""


def watch(losses: Iterable[float], norms: Iterable[float], until_diverged: bool = False) -> list[Verdict]:
    """The verdicts on a run, to its end or to the first "diverged"."""
    section = RecoverySettings()
    detector, verdicts = Detector(section.window, section.threshold), []
    for loss, norm in zip(losses, norms, strict=True):
        verdicts.append(detector.check(loss, norm))
        if verdicts[-1].state == "diverged":
            if until_diverged:
                break
            detector.accept()
    return verdicts


def replay(trace: Trace, until_diverged: bool = False) -> list[Verdict]:
    return watch(trace.loss.tolist(), trace.norm.tolist(), until_diverged)


def delay(verdicts: list[Verdict], at: int, states: tuple[str, ...] = ("suspected", "diverged")) -> int | None:
    """Steps from the fault at step ``at`` to the first of these verdicts, 1 for its own step; None where there is none."""
    return next((step + 1 for step, verdict in enumerate(verdicts[at:]) if verdict.state in states), None)


def tally(runs: list[list[Verdict]]) -> dict[str, Any]:
    """What healthy runs were called."""
    verdicts = [verdict for run in runs for verdict in run]
    alarms = [verdict for verdict in verdicts if verdict.state == "diverged"]
    return {
        "steps": len(verdicts),
        "alarms": len(alarms),
        "alarms_per_10000": 1e4 * len(alarms) / len(verdicts),
        "suspected_share": sum(verdict.state == "suspected" for verdict in verdicts) / len(verdicts),
        "suspicions": sum(verdict.state == "suspected" and verdict.since == 0 for verdict in verdicts),
        "accepted": sum(verdict.accepted for verdict in verdicts),
        "longest": max((verdict.since + 1 for verdict in verdicts if verdict.state != "healthy"), default=0),
        "reasons": [verdict.reason for verdict in alarms],
    }


def families(report: Report, seeds: range) -> None:
    rows = {name: tally([replay(make(np.random.default_rng(seed))) for seed in seeds]) for name, make in HEALTHY.items()}
    for name, row in rows.items():
        report.say(
            f"{name:<18} {row['alarms']} alarms in {row['steps']} steps, {row['suspected_share']:.2%} suspected in "
            f"{row['suspicions']} stretches, {row['accepted']} levels accepted"
        )
    report.data["healthy"] = rows
    worst = max(rows.values(), key=lambda row: row["alarms_per_10000"])
    report.bar("alarms per 10,000 healthy steps, worst family", worst["alarms_per_10000"], "<=", 1)
    share = max(row["suspected_share"] for name, row in rows.items() if name not in EVENTFUL)
    report.bar("share of healthy steps that are suspected, worst family without events", share, "<=", 0.1)
    report.bar("longest suspicion of a healthy run, in steps", max(row["longest"] for row in rows.values()), "<=", LIMIT)


def delays(report: Report, seeds: range) -> None:
    report.data["delays"] = {}
    for name, (factors, limit) in FAULTS.items():
        found = [delay(replay(faulty(np.random.default_rng(seed), factors)), FAULT_AT) or math.inf for seed in seeds]
        row = {"median": statistics.median(found), "nine_tenths": float(np.quantile(found, 0.9)), "worst": max(found)}
        report.data["delays"][name] = row | {"count": len(found)}
        report.say(f"{name}: suspected after {row['median']:g} steps, at worst {row['worst']:g}")
        report.bar(f"steps until {name} is suspected, nine of ten", row["nine_tenths"], "<=", limit)


def divergences(report: Report, seeds: range) -> None:
    """Of each kind, on the scatter of each background; not finite ones, too."""
    rows: dict[str, Any] = {}
    missed = total = 0
    for background in BACKGROUNDS:
        for kind in DIVERGENCES:
            runs = [replay(diverging(np.random.default_rng(seed), background, kind)) for seed in seeds]
            found = [delay(run, FAULT_AT, ("diverged",)) for run in runs]
            soon = [delay(run, FAULT_AT) for run in runs]
            missed, total = missed + found.count(None), total + len(found)
            steps = [step for step in found if step is not None]
            rows[f"{kind} on {background}"] = {
                "missed": found.count(None),
                "suspected_median": statistics.median(step or math.inf for step in soon),
                "diverged_median": statistics.median(steps or [math.inf]),
                "diverged_worst": max(steps, default=math.inf),
            }
    for seed in seeds:
        healthy = steady(np.random.default_rng(seed))
        for loss, norm in [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)]:
            last = watch([*healthy.loss[:FAULT_AT].tolist(), loss], [*healthy.norm[:FAULT_AT].tolist(), norm])[-1]
            missed, total = missed + (last.state != "diverged"), total + 1
    report.data["divergences"] = rows
    for name, row in rows.items():
        report.say(f"{name:<28} suspected after {row['suspected_median']:g}, diverged after {row['diverged_median']:g} steps")
    report.bar(f"divergences of {total} that are missed", missed, "<=", 0)


def real(report: Report) -> None:
    traces = recorded(TRACES)
    clean = {name: trace for name, trace in traces.items() if name.startswith("clean")}
    watched = {name: watch(*trace.tolist()) for name, trace in clean.items()}
    rows = {name: tally([verdicts]) for name, verdicts in watched.items()}
    together = tally(list(watched.values()))
    runs = {name.rpartition(".")[0] for name in clean}
    attempts = RecoverySettings().attempts
    report.data["real"] = {"runs": len(runs), "together": together, "each": rows}
    report.say(
        f"{len(runs)} clean runs: {together['alarms']} alarms in {together['steps']} steps, "
        f"{together['suspected_share']:.2%} suspected, {together['accepted']} levels accepted"
    )
    report.bar("real clean runs", len(runs), ">=", 30)
    report.bar("alarms in all of them", together["alarms"], "<=", 1)
    report.bar("clean runs with more alarms than attempts", sum(row["alarms"] > attempts for row in rows.values()), "<=", 0)
    report.bar("share of their steps that are suspected", together["suspected_share"], "<=", 0.05)
    sick = {name: watch(*trace.tolist(), until_diverged=True) for name, trace in traces.items() if name not in clean}
    found = {
        name: {
            "suspected": delay(verdicts, REAL_FAULT_AT),
            "diverged": delay(verdicts, REAL_FAULT_AT, ("diverged",)),
            "false": sum(verdict.state == "diverged" for verdict in verdicts[:REAL_FAULT_AT]),
        }
        for name, verdicts in sick.items()
    }
    report.data["real_faults"] = found
    for name, row in found.items():
        report.say(f"{name}: suspected after {row['suspected']}, diverged after {row['diverged']}")
    soon = [row["suspected"] or math.inf for name, row in found.items() if name.startswith(REAL_SOON)]
    report.bar(f"steps until the last of {len(soon)} real faults is suspected", max(soon), "<=", 5)
    ends = [row["diverged"] for name, row in found.items() if name.startswith(REAL_DIVERGENCES)]
    report.bar(f"real divergences of {len(ends)} that are missed", ends.count(None), "<=", 0)


def cost(report: Report) -> None:
    """Of one step, in this process."""
    trace = steady(np.random.default_rng(0))
    began = time.process_time()
    replay(trace)
    report.data["microseconds_a_step"] = 1e6 * (time.process_time() - began) / len(trace.loss)
    report.say(f"one step costs {report.data['microseconds_a_step']:.0f} us of processor time")


def main() -> None:
    arguments = parser(__doc__, seeds=12)
    arguments.add_argument("--first-seed", type=int, default=JUDGING, help="of the simulated runs; others are for tuning")
    arguments.add_argument("--record-traces", action="store_true", help="train the real runs anew and keep their traces")
    options = arguments.parse_args()
    report = Report("detector", options)
    if options.record_traces:
        record(TRACES, report.out / "traces", clean_runs(0) + sick_runs(0))
    seeds = range(options.first_seed, options.first_seed + (2 if options.small else options.seeds))
    report.data["seeds"] = [seeds.start, seeds.stop]
    cost(report)
    real(report)
    delays(report, range(seeds.start, seeds.start + 5 * len(seeds)))
    families(report, seeds)
    divergences(report, seeds)
    report.finish()


if __name__ == "__main__":
    main()
