"""What the losses that window.py measures say: shares of the gain, errors of predictions, the gate's advice."""

from __future__ import annotations

import statistics
from typing import Any, NamedTuple

import numpy as np

from distmerge.windows.advice import advise
from distmerge.windows.prediction import corrected, corrections

ANNEALS = ("linear", "1-sqrt")


class Size(NamedTuple):
    """Steps of the constant-rate run, its blocks, and the lengths of decays, in steps; where the earlier forks end, and
    their lengths."""

    steps: int
    every: int
    lengths: tuple[int, ...]
    early: int
    early_lengths: tuple[int, ...]


def shares(result: dict[str, Any], name: str) -> float:
    """Of one merge: the annealing gain recovered, against the better true decay of the same length."""
    length = name.split()[2]
    annealed = min(result["annealed"][f"{curve} {length}"] for curve in ANNEALS)
    return (result["constant"] - result["merged"][name]) / (result["constant"] - annealed)


def ledger(result: dict[str, Any], size: Size, early: bool = False) -> list[dict[str, Any]]:
    """The linear decays of one seed, as lines of a run's ledger."""
    end, prefix = (size.early, "early_") if early else (size.steps, "")
    return [
        {
            "from": end - length,
            "decay_steps": length,
            "curve": "linear",
            "merged": result[f"{prefix}merged"][f"mean linear {length}"],
            "outcome": result[f"{prefix}annealed"][f"linear {length}"],
        }
        for length in (size.early_lengths if early else size.lengths)
    ]


def errors(judged: list[dict[str, Any]], choosing: list[dict[str, Any]], size: Size) -> dict[str, dict[int, list[float]]]:
    """Relative errors of predictions of a linear decay, by length, of each judged seed.

    corrected: as ``distmerge anneal --calibrate`` with the runs of the choosing seeds. raw: the merge alone. own: the merge
    corrected by the run's own fork of that length that ended a third of the run earlier. unmerged: no merge, but what annealing
    gained on the choosing seeds.
    """
    known = [line for result in choosing for line in ledger(result, size)]
    found: dict[str, dict[int, list[float]]] = {kind: {} for kind in ("corrected", "raw", "own", "unmerged")}
    for result in judged:
        early = {line["decay_steps"]: line for line in ledger(result, size, early=True)}
        for line in ledger(result, size):
            length = line["decay_steps"]
            gains = [other["constant"] / other["annealed"][f"linear {length}"] for other in choosing]
            said = {
                "corrected": corrected(line["merged"], corrections(line, known)),
                "raw": line["merged"],
                "unmerged": result["constant"] / statistics.mean(gains),
            }
            if length in early:
                said["own"] = line["merged"] * early[length]["outcome"] / early[length]["merged"]
            for kind, predicted in said.items():
                found[kind].setdefault(length, []).append(predicted / line["outcome"] - 1)
    return found


def told(result: dict[str, Any]) -> dict[str, Any]:
    """What a record keeps of one seed."""
    return {key: value for key, value in result.items() if key != "grams"}


def advised(result: dict[str, Any], metric: str, every: int) -> str:
    """The merge nearest to the gate's advice among those that were measured.

    Args:
        metric: plain, or curved: distances weighed with Adam's second moments as the curvature's diagonal.
        every: steps of a block.
    """
    grams = result["grams"]
    advice = advise(np.array(grams[metric]), grams["starts"], grams["end"])
    lengths = sorted({int(name.split()[2]) for name in result["merged"]})
    length = min(lengths, key=lambda measured: abs(measured - advice.count * every))
    return f"mean {advice.curve} {length}"


def best_share(result: dict[str, Any]) -> float:
    return max(shares(result, name) for name in result["merged"] if name.startswith("mean"))
