"""Curves of general loss over skill loss that sweeps of omega give, and the properties of them that the paper claims."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

SHORTER = "cft "
"""The prefix of arms that are shorter runs of continued finetuning; their share of the steps follows it."""

SIMILAR = 0.05
"""A skill loss that is higher than another by at most this share counts as similar."""


class CurvePoint(NamedTuple):
    """A model on a curve.

    Attributes:
        at: omega, of a sweep; steps, of continued finetuning.
        general, own: the losses on the general text and on the skill's, in nats per token.
    """

    at: float
    general: float
    own: float


def points_of(measured: Iterable[dict[str, Any]], arm: str, skill: str | None, omega: float | None = None) -> list[dict]:
    """The point of an arm, for one skill, from every seed."""
    return [
        point
        for seed in measured
        for point in seed["points"]
        if point["arm"] == arm and point["skill"] in (skill, None) and (omega is None or point["omega"] == omega)
    ]


def curve(seed: dict[str, Any], arm: str, skill: str) -> list[CurvePoint]:
    """A sweep in ascending order of omega, beginning with the general model at 0."""
    start = next(point for point in seed["points"] if point["arm"] == "general")["losses"]
    found = [point for point in seed["points"] if point["arm"] == arm and point["skill"] == skill]
    swept = sorted(CurvePoint(point["omega"], point["losses"]["general"], point["losses"][skill]) for point in found)
    return [CurvePoint(0.0, start["general"], start[skill]), *swept]


def knee(points: list[CurvePoint]) -> float:
    """The omega of the point farthest from the chord between the curve's ends, with both losses scaled to [0, 1]."""
    values = np.asarray(points)
    scaled = values[:, 1:] - values[:, 1:].min(0)
    scaled /= np.maximum(scaled.max(0), 1e-12)
    first, last = scaled[0], scaled[-1]
    along = (last - first) / max(float(np.linalg.norm(last - first)), 1e-12)
    away = scaled - first
    below = away[:, 0] * along[1] - away[:, 1] * along[0]
    return float(values[int(np.argmax(np.abs(below))), 0])


def reached(points: list[CurvePoint], skill_loss: float) -> CurvePoint:
    """The point at which a sweep first comes down to a skill loss, interpolated linearly between its points. If it never does,
    its point with the lowest skill loss.

    The first point, the general model, does not count.
    """
    if points[0].own <= skill_loss:
        return points[1]
    for one, two in itertools.pairwise(points):
        if two.own <= skill_loss:
            share = (one.own - skill_loss) / (one.own - two.own)
            return CurvePoint(one.at + share * (two.at - one.at), one.general + share * (two.general - one.general), skill_loss)
    return min(points, key=lambda point: point.own)


def finetuning(seed: dict[str, Any], skill: str) -> list[CurvePoint]:
    """The runs of continued finetuning in ascending order of steps, beginning with the general model at 0."""
    own = [p for p in seed["points"] if p["skill"] in (skill, None)]
    found = [p for p in own if p["arm"] in ("general", "cft") or p["arm"].startswith(SHORTER)]
    return sorted(
        CurvePoint(0.0 if p["arm"] == "general" else p["steps"], p["losses"]["general"], p["losses"][skill]) for p in found
    )


def as_skilled(runs: list[CurvePoint], skill_loss: float) -> CurvePoint:
    """The run with the skill loss nearest to the given one among those that are not below it, so that PTM is compared with a
    model that knows no more of the skill. Where all runs are below it, the first, which is the general model.
    """
    above = [run for run in runs if run.own >= skill_loss]
    return min(above, key=lambda run: run.own) if above else runs[0]


def shape(skill: str, measured: list[dict[str, Any]]) -> dict[str, Any]:
    """The properties of the curves that the paper claims, as measured: a list with a value for each seed. An excess is a
    difference of general losses; a gap is the share by which a skill loss lies above another.

    Returns:
        ``omega``: |D| / |G|. ``knee``: of the PTM curve.
        ``equal_excess``: of the run of continued finetuning (CFT) whose skill loss is nearest above PTM's at |D| / |G|, over
        PTM's; ``equal_gap`` is the gap between them, ``equal_steps`` the length of that run.
        ``cft_general_excess``: of the longest run of CFT, over PTM where the two have the same skill loss or, if PTM does not
        get there, where PTM's is lowest; ``skill_gap`` is then PTM's gap.
        ``similar_excess``: the same where PTM's skill loss is SIMILAR above CFT's or, if PTM does not get there, lowest; with
        ``similar_gap`` and ``similar_omega``.
        ``wise_ft_excess``: of the longest run of CFT over WiSE-FT at that skill loss.
        ``front``: the share of PTM's points that no point of WiSE-FT or linear interpolation beats on both losses.
        ``rt_tokens``, ``ptm_tokens``: training tokens of retraining and of PTM.
    """
    found: dict[str, Any] = {}
    for seed in measured:
        swept = curve(seed, "ptm", skill)
        (cft,) = points_of([seed], "cft", skill)
        (rt,) = points_of([seed], "rt", skill)
        general, own = cft["losses"]["general"], cft["losses"][skill]
        nearest, similar = reached(swept, own), reached(swept, own * (1 + SIMILAR))
        wise = reached(curve(seed, "wise-ft", skill), max(own * (1 + SIMILAR), similar.own))
        others = [point for arm in ("linear", "wise-ft") for point in curve(seed, arm, skill)[1:]]
        (ptm,) = points_of([seed], "ptm", skill, seed["omega"][skill])
        equal = as_skilled(finetuning(seed, skill), ptm["losses"][skill])
        beaten = [any(other.general < point.general and other.own < point.own for other in others) for point in swept[1:]]
        values = {
            "omega": seed["omega"][skill],
            "knee": knee(swept),
            "equal_excess": equal.general - ptm["losses"]["general"],
            "equal_gap": equal.own / ptm["losses"][skill] - 1,
            "equal_steps": equal.at,
            "cft_general_excess": general - nearest.general,
            "skill_gap": nearest.own / own - 1,
            "similar_omega": similar.at,
            "similar_excess": general - similar.general,
            "similar_gap": similar.own / own - 1,
            "wise_ft_excess": general - wise.general,
            "front": 1 - sum(beaten) / len(beaten),
            "rt_tokens": rt["tokens"],
            "ptm_tokens": cft["tokens"],
        }
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    return found
