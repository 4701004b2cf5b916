"""The curves that sweeps of omega draw, general loss against skill loss, and what of them the published ones claim."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

SHORTER = "cft "
"""How the arms begin that are shorter runs of continued finetuning; their share of its steps follows."""

SIMILAR = 0.05
"""By which share a skill loss may lie above another and still count as similar."""


def points_of(measured: Iterable[dict[str, Any]], arm: str, skill: str | None, omega: float | None = None) -> list[dict]:
    """The same point of every seed."""
    return [
        point
        for seed in measured
        for point in seed["points"]
        if point["arm"] == arm and point["skill"] in (skill, None) and (omega is None or point["omega"] == omega)
    ]


def curve(seed: dict[str, Any], arm: str, skill: str) -> list[tuple[float, float, float]]:
    """(omega, general loss, skill loss) of a sweep, from the general model on."""
    start = next(point for point in seed["points"] if point["arm"] == "general")["losses"]
    found = [point for point in seed["points"] if point["arm"] == arm and point["skill"] == skill]
    swept = sorted((point["omega"], point["losses"]["general"], point["losses"][skill]) for point in found)
    return [(0.0, start["general"], start[skill]), *swept]


def knee(points: list[tuple[float, float, float]]) -> float:
    """The omega farthest below the chord between the curve's ends, both losses scaled to [0, 1] over the sweep."""
    values = np.asarray(points)
    scaled = values[:, 1:] - values[:, 1:].min(0)
    scaled /= np.maximum(scaled.max(0), 1e-12)
    first, last = scaled[0], scaled[-1]
    along = (last - first) / max(float(np.linalg.norm(last - first)), 1e-12)
    away = scaled - first
    below = away[:, 0] * along[1] - away[:, 1] * along[0]
    return float(values[int(np.argmax(np.abs(below))), 0])


def reached(points: list[tuple[float, float, float]], skill_loss: float) -> tuple[float, float, float]:
    """Where a sweep comes down to a skill loss, on straight lines between its points; its lowest point if it does not.

    Its first point, where nothing is merged yet, does not count.
    """
    if points[0][2] <= skill_loss:
        return points[1]
    for (omega, general, own), (next_omega, next_general, next_own) in itertools.pairwise(points):
        if next_own <= skill_loss:
            share = (own - skill_loss) / (own - next_own)
            return omega + share * (next_omega - omega), general + share * (next_general - general), skill_loss
    return min(points, key=lambda point: point[2])


def finetuning(seed: dict[str, Any], skill: str) -> list[tuple[float, float, float]]:
    """(steps, general loss, skill loss) of continued finetuning, from the general model on: each a run of its own."""
    own = [p for p in seed["points"] if p["skill"] in (skill, None)]
    found = [p for p in own if p["arm"] in ("general", "cft") or p["arm"].startswith(SHORTER)]
    return sorted((0.0 if p["arm"] == "general" else p["steps"], p["losses"]["general"], p["losses"][skill]) for p in found)


def as_skilled(runs: list[tuple[float, float, float]], skill_loss: float) -> tuple[float, float, float]:
    """The run that comes nearest to a skill loss from above, so that what is said of its general loss is said of a model that
    knows no more of the skill. Where all know more it is the first, which has not begun.
    """
    above = [run for run in runs if run[2] >= skill_loss]
    return min(above, key=lambda run: run[2]) if above else runs[0]


def shape(skill: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """What the published curves claim, measured: a value a seed.

    ``equal_excess``: the general loss above PTM's at |D| / |G|, of a run of continued finetuning (CFT) that ends at PTM's skill
    loss or ``equal_gap`` above it, after ``equal_steps``. ``cft_general_excess``: that of the longest run of CFT above PTM's
    where PTM's skill loss is CFT's, or else at PTM's least; ``skill_gap``: the share by which it then lies above.
    ``similar_excess``: the same where PTM's skill loss is SIMILAR above CFT's, or at its least, if that is higher;
    ``similar_gap`` and ``similar_omega`` belong to it. ``wise_ft_excess``: of WiSE-FT at that skill loss. ``knee``: of the PTM
    curve. ``front``: the share of PTM's points that no point of WiSE-FT or of linear beats on both.
    """
    found: dict[str, Any] = {}
    for seed in measured:
        swept = curve(seed, "ptm", skill)
        (cft,) = points_of([seed], "cft", skill)
        (rt,) = points_of([seed], "rt", skill)
        general, own = cft["losses"]["general"], cft["losses"][skill]
        nearest, similar = reached(swept, own), reached(swept, own * (1 + SIMILAR))
        wise = reached(curve(seed, "wise-ft", skill), max(own * (1 + SIMILAR), similar[2]))
        others = [point for arm in ("linear", "wise-ft") for point in curve(seed, arm, skill)[1:]]
        (ptm,) = points_of([seed], "ptm", skill, seed["omega"][skill])
        equal = as_skilled(finetuning(seed, skill), ptm["losses"][skill])
        beaten = [any(o[1] < p[1] and o[2] < p[2] for o in others) for p in swept[1:]]
        values = {
            "omega": seed["omega"][skill],
            "knee": knee(swept),
            "equal_excess": equal[1] - ptm["losses"]["general"],
            "equal_gap": equal[2] / ptm["losses"][skill] - 1,
            "equal_steps": equal[0],
            "cft_general_excess": general - nearest[1],
            "skill_gap": nearest[2] / own - 1,
            "similar_omega": similar[0],
            "similar_excess": general - similar[1],
            "similar_gap": similar[2] / own - 1,
            "wise_ft_excess": general - wise[1],
            "front": 1 - sum(beaten) / len(beaten),
            "rt_tokens": rt["tokens"],
            "ptm_tokens": cft["tokens"],
        }
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return found
