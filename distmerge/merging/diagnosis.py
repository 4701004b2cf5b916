"""A diagnosis of models: how similar their task vectors are, and which method to merge them by. It is made before or during a
merge."""

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

SIMILAR = 0.9
"""Above this mean cosine a plain average is recommended."""

CONCENTRATED = 0.5
"""Below this concentration ``|x|_1^2 / (n |x|_2^2)`` few elements carry the task vectors; a normal distribution has 2/pi."""


@dataclass(frozen=True)
class Figures:
    """Statistics of the task vectors of M models over a group of tensors.

    Attributes:
        cosines: ``[M][M]``, between the task vectors.
        norms: ``[M]``, of the task vectors.
        conflict_count: the share of elements in which the models disagree about the sign, among those where any is not 0.
        conflict_mass: the share of the mass that cancels in the sum: ``1 - sum_i |sum_m x_mi| / sum_i sum_m |x_mi|``.
        concentration: ``[M]``, ``|x|_1^2 / (n |x|_2^2)``: 2/pi for a normal distribution, less where few elements carry x.
        lost_to_rounding: the norm of the error of rounding to the output's dtype, relative to that of the merged task vector.
        each_lost_to_rounding: ``[M]``, the same for each model, if it were stored in the output's dtype.
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
    """A recommended method, its parameters, and the reasons for it, one sentence each."""

    method: str
    parameters: dict[str, float]
    reasons: list[str]


@dataclass(frozen=True)
class SubspaceOverlap:
    """The overlap of the leading left singular subspaces of two models' task vectors.

    Attributes:
        tensor: its name.
        pair: indices into the models.
        overlap: from 0 (orthogonal) to 1 (the same subspace).
    """

    tensor: str
    pair: tuple[int, int]
    overlap: float


@dataclass(frozen=True)
class AdapterSimilarity:
    """Norms ``[M]`` of adapters' weight changes and cosines ``[M][M]`` between them, computed from their factors alone."""

    norms: list[float]
    cosines: list[list[float]]


@dataclass(frozen=True)
class PairFigure:
    """A number about two models.

    Attributes:
        pair: indices into the models.
        value: in nats per token.
    """

    pair: tuple[int, int]
    value: float


@dataclass(frozen=True)
class OnText:
    """What was measured on text.

    Attributes:
        losses: of each model, in nats per token.
        barriers: for each pair, how far the loss along the line between the models rises above the line between their losses.
        divergences: for each pair, the mean of KL(one | two) and KL(two | one) of their predictions, per token.
    """

    losses: list[float]
    barriers: list[PairFigure]
    divergences: list[PairFigure]


@dataclass(frozen=True)
class Diagnosis:
    """A diagnosis of models that are to be merged.

    Attributes:
        origin: the model that the task vectors start from.
        models: the members, in order.
        whole: statistics over all tensors.
        layers: over each layer, by its name.
        kinds: over the same tensor of all layers, by its name with a star in place of the layer's index.
        recommendation: None without a base, or for a single model.
        subspaces: for each matrix and pair; None where they were not asked for.
        adapters: None unless all models are plain LoRA adapters.
        on_text: None where no text was given.
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
        """The diagnosis as a JSON object, without what was not asked for."""
        found = asdict(self)
        on_text: dict[str, Any] = found.pop("on_text") or {}
        return {key: value for key, value in found.items() if value is not None or key == "recommendation"} | on_text

    def __str__(self) -> str:
        return table(self)


class Similarity:
    """The observer that measures task vectors, in floating point tensors that have a base or an origin."""

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
"""What ``Similarity`` noted of a tensor: sums that can be added over tensors, as JSON."""


def summarise(notes: dict[str, Note | None], models: list[str], origin: str, based: bool = True) -> Diagnosis:
    """The diagnosis from the notes on each tensor: over all tensors, over each layer, over each kind of tensor.

    Args:
        notes: what ``Similarity`` noted of each tensor; None where it measured nothing.
        models: the members, in order.
        origin: the model that their task vectors start from.
        based: whether they were trained from that model; without a base nothing can be recommended.
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
    """The statistics of several tensors together, from the sums in their notes."""
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
    """Recommend a method by a rule of thumb: the plain mean for task vectors with a mean cosine above 0.9, else a method that
    resolves sign conflicts, which is TIES if few elements carry the task vectors and DARE-TIES if not."""
    cosines = np.asarray(whole.cosines)
    pairs = cosines[np.triu_indices(len(cosines), 1)]
    mean_cosine = float(pairs.mean()) if len(pairs) else 1.0
    found = f"the mean cosine between task vectors is {mean_cosine:.3f}"
    if mean_cosine > SIMILAR:
        reasons = [f"{found}, above {SIMILAR}: they point in the same direction, and averaging loses little"]
        return Recommendation("mean", {}, reasons)
    reasons = [f"{found}, not above {SIMILAR}: a plain average would shrink what they do not share"]
    reasons.append(
        f"the signs conflict in {whole.conflict_count:.0%} of the elements, and {whole.conflict_mass:.0%} of the mass cancels: "
        "one sign is elected for each element"
    )
    concentration = float(np.mean(whole.concentration))
    if concentration < CONCENTRATED:
        reasons.append(
            f"few elements carry the task vectors (concentration {concentration:.2f}, normal 0.64): small ones are trimmed"
        )
        return Recommendation("ties", {"density": 0.2}, reasons)
    reasons.append(
        f"many elements carry the task vectors (concentration {concentration:.2f}, normal 0.64): elements are dropped at random"
    )
    return Recommendation("dare_ties", {"density": 0.5}, reasons)


def table(report: Diagnosis) -> str:
    """The diagnosis as text for a terminal."""
    whole = report.whole
    names = [f"[{index}] {model}" for index, model in enumerate(report.models)]
    lines = [*names, "", "cosines between task vectors:"]
    lines += ["  " + "  ".join(f"{value:7.4f}" for value in row) for row in whole.cosines]
    lines += [
        "norms: " + "  ".join(f"{value:.4g}" for value in whole.norms),
        f"sign conflict: {whole.conflict_count:.1%} of the elements, {whole.conflict_mass:.1%} of the mass",
        f"lost to rounding to the output's dtype: {whole.lost_to_rounding:.1%} of the mean task vector",
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
