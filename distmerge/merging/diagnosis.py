"""A diagnosis: how the task vectors relate, and what follows for merging them. It is made before or during a merge."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.files.stream import Job
from distmerge.rules import similarity
from distmerge.rules.protocol import Block, Measured, Tally
from distmerge.rules.torch_typed import to_list
from distmerge.theta.layers import in_block, place_of

ALIKE = 0.9
"""Above this mean cosine a plain average is recommended."""

SPREAD_OUT = 0.5
"""|x|_1^2 / (n |x|_2^2): 2/pi for a normal distribution, less where few elements carry the vector."""


@dataclass(frozen=True)
class Figures:
    """The figures of some tensors together, of M models.

    Attributes:
        cosines: ``[M][M]``, between the task vectors.
        norms: ``[M]``, of the task vectors.
        conflict_count: the share of elements with members of both signs, of those where any is not 0.
        conflict_mass: the share of mass that cancels, ``1 - |sum| / sum||``.
        concentration: ``[M]``, ``|x|_1^2 / (n |x|_2^2)``: 2/pi for a normal distribution, less where few elements carry x.
        lost_to_rounding: the norm of the rounding to the output's dtype over that of the merged task vector.
        each_lost_to_rounding: ``[M]``, that of each member, were it stored in the output's dtype, over its task vector's.
    """

    cosines: list[list[float]]
    norms: list[float]
    conflict_count: float
    conflict_mass: float
    concentration: list[float]
    lost_to_rounding: float
    each_lost_to_rounding: list[float]


@dataclass(frozen=True)
class Recommendation:
    """A method, its parameters, and the reasons for it, each a sentence."""

    method: str
    parameters: dict[str, float]
    reasons: list[str]


@dataclass(frozen=True)
class SubspaceOverlap:
    """How much the leading left singular directions of two models' task vectors share, from 0 to 1.

    Attributes: the tensor's name; the pair, as indices into the models; the overlap.
    """

    tensor: str
    pair: tuple[int, int]
    overlap: float


@dataclass(frozen=True)
class AdapterSimilarity:
    """Norms ``[M]`` of adapters' changes and cosines ``[M][M]`` between them, from their factors alone."""

    norms: list[float]
    cosines: list[list[float]]


@dataclass(frozen=True)
class PairFigure:
    """A figure of two models. Attributes: the pair, as indices into the models; the value, in nats."""

    pair: tuple[int, int]
    value: float


@dataclass(frozen=True)
class OnText:
    """What text says of the models.

    Attributes:
        losses: of each model, nats per token.
        barriers: how far the loss rises above the straight line between two models' losses, on the way between them.
        divergences: the mean of KL(one | two) and KL(two | one) of two models' predictions over the tokens.
    """

    losses: list[float]
    barriers: list[PairFigure]
    divergences: list[PairFigure]


@dataclass(frozen=True)
class Diagnosis:
    """What was found out about models that are to be merged.

    Attributes:
        origin: what the task vectors start from.
        models: the members, in order.
        whole: over all tensors.
        layers: over each layer, by its name.
        kinds: over the same tensor of all layers, by its name with a star for the layer.
        recommendation: None without a base, or for one model alone.
        subspaces: of each matrix and pair; None where they were not asked for.
        adapters: where all models are plain LoRA adapters.
        on_text: where there was text to measure on.
    """

    origin: str
    models: list[str]
    whole: Figures
    layers: dict[str, Figures]
    kinds: dict[str, Figures]
    recommendation: Recommendation | None
    subspaces: list[SubspaceOverlap] | None = None
    adapters: AdapterSimilarity | None = None
    on_text: OnText | None = None

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON has it; what was not asked for is left out."""
        found = asdict(self)
        on_text: dict[str, Any] = found.pop("on_text") or {}
        return {key: value for key, value in found.items() if value is not None or key == "recommendation"} | on_text

    def __str__(self) -> str:
        return table(self)


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
        return similarity.settle(tally) | {name: to_list(tally.total(name)) for name in ("rounding", "each")}


Note = dict[str, Any]
"""What ``Similarity`` settled for a tensor: sums that add up over tensors, as JSON."""


def summarise(notes: dict[str, Note | None], models: list[str], origin: str, based: bool = True) -> Diagnosis:
    """The diagnosis: over all tensors, over each layer, over each kind of tensor.

    Args:
        notes: what ``Similarity`` settled for each tensor; None where it saw nothing.
        models: the members, in order.
        origin: what their task vectors start from.
        based: whether that is what they were trained from; without a base nothing can be recommended.
    """
    seen = {name: note for name, note in notes.items() if note is not None}
    layers: dict[str, list[Note]] = {}
    kinds: dict[str, list[Note]] = {}
    for name, note in seen.items():
        place = place_of(name)
        if place is not None:
            layers.setdefault(f"{place.list}{place.index}", []).append(note)
        kinds.setdefault(in_block(name, "*"), []).append(note)
    whole = added(list(seen.values()))
    return Diagnosis(
        origin=origin,
        models=models,
        whole=whole,
        layers={name: added(found) for name, found in layers.items()},
        kinds={name: added(found) for name, found in kinds.items()},
        recommendation=recommend(whole) if based and len(models) > 1 else None,
    )


def added(notes: list[Note]) -> Figures:
    """The figures of several tensors together."""
    sums = {key: np.sum([np.asarray(note[key], dtype=np.float64) for note in notes], axis=0) for key in notes[0]}
    gram, mass = sums["gram"], sums["mass"]
    norms = np.sqrt(np.maximum(np.diagonal(gram), 0))
    scale = np.outer(norms, norms)
    cosines = np.divide(gram, scale, out=np.zeros_like(gram), where=scale > 0)
    moment = sums["count"] * np.diagonal(gram)
    spread = np.divide(sums["l1"] ** 2, moment, out=np.zeros_like(norms), where=moment > 0)
    lost, merged = sums["rounding"]
    return Figures(
        cosines=cosines.round(6).tolist(),
        norms=norms.tolist(),
        conflict_count=float(sums["conflicts"] / max(1.0, float(sums["live"]))),
        conflict_mass=float(mass[0] / mass[1]) if mass[1] > 0 else 0.0,
        concentration=spread.tolist(),
        lost_to_rounding=float(np.sqrt(lost / merged)) if merged > 0 else 0.0,
        each_lost_to_rounding=np.divide(np.sqrt(sums["each"]), norms, out=np.zeros_like(norms), where=norms > 0).tolist(),
    )


def recommend(whole: Figures) -> Recommendation:
    """A method and the reasons for it. The rule of thumb: above a correlation of 0.9 average, below mind the conflicts."""
    cosines = np.asarray(whole.cosines)
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    alike = float(pairs.mean()) if len(pairs) else 1.0
    said = f"the mean cosine between task vectors is {alike:.3f}"
    if alike > ALIKE:
        reasons = [f"{said}, above {ALIKE}: they point the same way, and averaging loses nothing"]
        return Recommendation("mean", {}, reasons)
    reasons = [f"{said}, not above {ALIKE}: a plain average would shrink what they do not share"]
    reasons.append(
        f"{whole.conflict_count:.0%} of the elements have both signs, {whole.conflict_mass:.0%} of the mass cancels: "
        "the signs are elected"
    )
    spread = float(np.mean(whole.concentration))
    if spread < SPREAD_OUT:
        reasons.append(
            f"few elements carry the task vectors (concentration {spread:.2f}, normal 0.64): the small ones are trimmed"
        )
        return Recommendation("ties", {"density": 0.2}, reasons)
    reasons.append(
        f"no few elements carry the task vectors (concentration {spread:.2f}, normal 0.64): elements are dropped at random"
    )
    return Recommendation("dare_ties", {"density": 0.5}, reasons)


def table(report: Diagnosis) -> str:
    """The diagnosis for a terminal."""
    whole = report.whole
    names = [f"[{index}] {model}" for index, model in enumerate(report.models)]
    lines = [*names, "", "cosines between task vectors:"]
    lines += ["  " + "  ".join(f"{value:7.4f}" for value in row) for row in whole.cosines]
    lines += [
        "norms: " + "  ".join(f"{value:.4g}" for value in whole.norms),
        f"sign conflict: {whole.conflict_count:.1%} of the elements, {whole.conflict_mass:.1%} of the mass",
        f"lost to the output's rounding: {whole.lost_to_rounding:.1%} of the mean task vector",
    ]
    if report.subspaces is not None:
        mean = np.mean([entry.overlap for entry in report.subspaces]) if report.subspaces else 0.0
        lines.append(f"overlap of the leading subspaces: {mean:.3f} (mean over matrices and pairs)")
    if report.adapters is not None:
        lines.append("cosines between adapters, from their factors alone:")
        lines += ["  " + "  ".join(f"{value:7.4f}" for value in row) for row in report.adapters.cosines]
    if report.on_text is not None:
        for figures, title in ((report.on_text.barriers, "loss barrier"), (report.on_text.divergences, "KL divergence")):
            lines += [f"{title} {figure.pair[0]}-{figure.pair[1]}: {figure.value:.4f} nats" for figure in figures]
    if report.recommendation is None:
        return "\n".join(lines)
    said = " ".join(f"{key} = {value}" for key, value in report.recommendation.parameters.items())
    chosen = f"recommended: {report.recommendation.method} {said}".rstrip()
    return "\n".join([*lines, "", chosen, *(f"- {why}" for why in report.recommendation.reasons)])
