"""``distmerge diagnose``: what the task vectors say about merging them, before or while they are merged."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.files.models import LAYER, layer_of
from distmerge.files.stream import Job
from distmerge.rules import similarity
from distmerge.rules.protocol import Block, Measured, Tally

ALIKE = 0.9
"""Above this mean cosine a plain average is recommended."""

SPREAD_OUT = 0.5
"""|x|_1^2 / (n |x|_2^2): 2/pi for a normal distribution, less where few elements carry the vector."""


class Similarity:
    """An observer of task vectors. Looks only at floating point tensors that have a base, or an origin in place of one."""

    def measure(self, job: Job, block: Block, merged: Tensor, written: Tensor) -> Measured:
        if block.base is None or not merged.is_floating_point():
            return Measured()
        base = block.base.float()
        members = [one for one, source in zip(block.members, job.members, strict=True) if source is not job.origin]
        delta = torch.stack([member.float() - base for member in members])
        found = similarity.measure(delta)
        exact = merged.float()
        lost = torch.stack([(written.float() - exact).square().sum(), (exact - base).square().sum()])
        each = torch.stack([(member.to(written.dtype).float() - member.float()).square().sum() for member in members])
        return Measured(found.added, found.kept | {"rounding": lost, "each": each})

    def settle(self, job: Job, tally: Tally) -> Any:
        if "live" not in tally.added:
            return None
        return similarity.settle(tally) | {name: tally.total(name).tolist() for name in ("rounding", "each")}


def summarise(notes: dict[str, Any], models: list[str], origin: str, based: bool = True) -> dict[str, Any]:
    """The report: over all tensors, over each layer, over each kind of tensor.

    Args:
        notes: what ``Similarity`` settled for each tensor; None where it saw nothing.
        models: the members, in order.
        origin: what their task vectors start from.
        based: whether that is what they were trained from; without a base nothing can be recommended.
    """
    seen = {name: note for name, note in notes.items() if note is not None}
    layers: dict[str, list[Any]] = {}
    kinds: dict[str, list[Any]] = {}
    for name, note in seen.items():
        place = layer_of(name)
        if place is not None:
            layers.setdefault(f"{place[0]}{place[1]}", []).append(note)
        kinds.setdefault(LAYER.sub(".*.", name, count=1), []).append(note)
    whole = added(list(seen.values()))
    return {
        "origin": origin,
        "models": models,
        "whole": whole,
        "layers": {name: added(found) for name, found in layers.items()},
        "kinds": {name: added(found) for name, found in kinds.items()},
        "recommendation": recommend(whole) if based and len(models) > 1 else None,
    }


def added(notes: list[Any]) -> dict[str, Any]:
    """The figures of several tensors together.

    Returns:
        cosines [M][M], norms [M], the share of elements with members of both signs (``conflict_count``, of those where any
        is not 0), the share of mass that cancels ``1 - |sum|/sum||`` (``conflict_mass``), ``concentration`` [M], and
        ``lost_to_rounding``, the norm of the rounding over that of the merged task vector, and ``each_lost_to_rounding`` [M],
        that of each member, were it stored in the output's dtype, over its task vector's.
    """
    sums = {key: np.sum([np.asarray(note[key], dtype=np.float64) for note in notes], axis=0) for key in notes[0]}
    gram, mass = sums["gram"], sums["mass"]
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0))
    scale = np.outer(norms, norms)
    cosines = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    moment = sums["count"] * np.diagonal(gram)
    spread = np.divide(sums["l1"] ** 2, moment, out=np.zeros_like(norms), where=moment > 0)
    lost, merged = sums["rounding"]
    return {
        "cosines": cosines.round(6).tolist(),
        "norms": norms.tolist(),
        "conflict_count": float(sums["conflicts"] / max(1.0, float(sums["live"]))),
        "conflict_mass": float(mass[0] / mass[1]) if mass[1] > 0 else 0.0,
        "concentration": spread.tolist(),
        "lost_to_rounding": float(np.sqrt(lost / merged)) if merged > 0 else 0.0,
        "each_lost_to_rounding": np.divide(np.sqrt(sums["each"]), norms, out=np.zeros_like(norms), where=norms > 0).tolist(),
    }


def recommend(whole: dict[str, Any]) -> dict[str, Any]:
    """A method and the reasons for it. The rule of thumb: above a correlation of 0.9 average, below mind the conflicts."""
    cosines = np.asarray(whole["cosines"])
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    alike = float(pairs.mean()) if len(pairs) else 1.0
    said = f"the mean cosine between task vectors is {alike:.3f}"
    if alike > ALIKE:
        reasons = [f"{said}, above {ALIKE}: they point the same way, and averaging loses nothing"]
        return {"method": "mean", "parameters": {}, "reasons": reasons}
    reasons = [f"{said}, not above {ALIKE}: a plain average would shrink what they do not share"]
    reasons.append(
        f"{whole['conflict_count']:.0%} of the elements have both signs, {whole['conflict_mass']:.0%} of the mass cancels: "
        "the signs are elected"
    )
    spread = float(np.mean(whole["concentration"]))
    if spread < SPREAD_OUT:
        reasons.append(
            f"few elements carry the task vectors (concentration {spread:.2f}, normal 0.64): the small ones are trimmed"
        )
        return {"method": "ties", "parameters": {"density": 0.2}, "reasons": reasons}
    reasons.append(
        f"no few elements carry the task vectors (concentration {spread:.2f}, normal 0.64): elements are dropped at random"
    )
    return {"method": "dare_ties", "parameters": {"density": 0.5}, "reasons": reasons}


def table(report: dict[str, Any]) -> str:
    """The report for a terminal."""
    whole = report["whole"]
    names = [f"[{index}] {model}" for index, model in enumerate(report["models"])]
    lines = [*names, "", "cosines between task vectors:"]
    lines += ["  " + "  ".join(f"{value:7.4f}" for value in row) for row in whole["cosines"]]
    lines += [
        "norms: " + "  ".join(f"{value:.4g}" for value in whole["norms"]),
        f"sign conflict: {whole['conflict_count']:.1%} of the elements, {whole['conflict_mass']:.1%} of the mass",
        f"lost to the output's rounding: {whole['lost_to_rounding']:.1%} of the mean task vector",
    ]
    if "subspaces" in report:
        mean = np.mean([entry["overlap"] for entry in report["subspaces"]]) if report["subspaces"] else 0.0
        lines.append(f"overlap of the leading subspaces: {mean:.3f} (mean over matrices and pairs)")
    if "adapters" in report:
        lines.append("cosines between adapters, from their factors alone:")
        lines += ["  " + "  ".join(f"{value:7.4f}" for value in row) for row in report["adapters"]["cosines"]]
    for key, title in (("barriers", "loss barrier"), ("divergences", "KL divergence")):
        lines += [f"{title} {entry['pair'][0]}-{entry['pair'][1]}: {entry['value']:.4f} nats" for entry in report.get(key, [])]
    chosen = report["recommendation"]
    said = " ".join(f"{key} = {value}" for key, value in chosen["parameters"].items())
    return "\n".join(
        [*lines, "", f"recommended: {chosen['method']} {said}".rstrip(), *(f"- {why}" for why in chosen["reasons"])]
    )
