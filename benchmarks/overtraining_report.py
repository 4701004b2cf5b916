"""What overtraining.py found, over the seeds: means, bars, the picture."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
from report import RECORDS, Report


def gains(results: list[dict[str, Any]], label: str, method: str) -> list[float]:
    """By how much an arm's merged test loss is below full length's, seed by seed."""
    return [result["arms"]["full length"]["methods"][method] - result["arms"][label]["methods"][method] for result in results]


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one arm: the curves' means, the peaks, the arms, the retention."""
    curves: dict[str, list[float]] = {"step": [point["step"] for point in results[0]["curve"]]}
    for index in range(len(curves["step"])):
        points = [result["curve"][index] for result in results]
        curves.setdefault("own", []).append(statistics.mean(statistics.mean(p["own"].values()) for p in points))
        for method in points[0]["methods"]:
            curves.setdefault(method, []).append(statistics.mean(p["methods"][method] for p in points))
    methods = [key for key in curves if key not in ("step", "own")]
    spread = {method: gains(results, "merged", method) for method in methods}
    return {
        "parameters": results[0]["parameters"],
        "seeds": len(results),
        "curves": curves,
        "peak_step": {key: curves["step"][int(np.argmin(curves[key]))] for key in ["own", *methods]},
        "overtrained": {key: curves[key][-1] - min(curves[key]) for key in ["own", *methods]},
        "arms": {
            label: {
                "own": statistics.mean(statistics.mean(r["arms"][label]["own"].values()) for r in results),
                "steps": statistics.mean(statistics.mean(r["arms"][label]["steps"].values()) for r in results),
            }
            | {method: statistics.mean(r["arms"][label]["methods"][method] for r in results) for method in methods}
            for label in results[0]["arms"]
        },
        "gain_of_merged": spread,
        "retention": {
            label: [
                statistics.mean(r["retention"][label]["deciles"][index]["retention"] for r in results) for index in range(10)
            ]
            for label in ("full length", "merged")
        },
        "wrong_labels": [r["retention"]["full length"].get("wrong") for r in results],
        "right_labels": [r["retention"]["full length"].get("right") for r in results],
    }


def judge_bars(report: Report, found: dict[str, dict[str, Any]]) -> None:
    """Rule "merged" against full length, in the mean of the seeds over their deviation, by the method that it watched."""
    worst, better = [], []
    for summary in found.values():
        values = summary["gain_of_merged"]["mean"]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        worst.append(statistics.mean(values) + deviation)
        if summary["overtrained"]["mean"] > deviation:
            better.append(statistics.mean(values) - deviation)
    claim = 'rule "merged" against full length: gain in merged mean loss plus the seeds\' deviation, worst arm, nats'
    report.bar(claim, min(worst), ">=", 0.0, quality=True)
    if better or report.small:
        claim = 'rule "merged" where overtraining shows: gain less the seeds\' deviation, worst such arm, nats'
        report.bar(claim, min(better, default=None), ">=", 0.0, quality=True)


def plot(report: Report, found: dict[str, dict[str, Any]]) -> None:
    """Own and merged loss against steps, and retention against difficulty, an arm a column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(found), 6), layout="constrained")
    axes = figure.subplots(2, len(found), squeeze=False)
    for column, (name, summary) in enumerate(found.items()):
        curves = summary["curves"]
        for key, values in curves.items():
            if key != "step":
                axes[0, column].plot(curves["step"], values, marker=".", label=key, color="black" if key == "own" else None)
        axes[0, column].set(xscale="log", title=name, xlabel="steps", ylabel="test loss" if not column else "")
        for label, values in summary["retention"].items():
            axes[1, column].plot(range(1, 11), values, marker=".", label=label)
        axes[1, column].set(xlabel="difficulty, decile", ylabel="P(merge right | expert right)" if not column else "")
    axes[0, 0].legend(fontsize=7)
    axes[1, 0].legend(fontsize=7)
    for folder in (report.out, *([RECORDS] if report.recording else [])):
        figure.savefig(folder / "overtraining.png", dpi=90)
