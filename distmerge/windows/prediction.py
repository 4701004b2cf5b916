"""What annealing a run would reach, told before it is annealed.

The merge of the window of the same steps, by the same curve, stands for the decay (WSM, https://arxiv.org/abs/2507.17634).
It is off by a few tenths to two and a half percent: a long window lags behind a decay, a short one is quieter than a short
decay. How far, depends on where in training the fork lies and how long it is, and by half a percent on the seed. So forks of
about the same place and length that were really annealed, of this run or of one that differs by its seed, correct it.
Forks farther away do not: over a third of a run the bias moved by more than a percent (benchmarks/window.py).
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.files.directories import verify
from distmerge.windows.blocks import RECORD, TENSORS, Block, block_weights, legible, merge_stored, published_blocks

NEAR = 0.1
"""How far, as a share of each, the end and the length of a fork may lie from those of one that it corrects."""

SCATTER = 0.005
"""How far the biases of forks that differ by their seed alone lie apart, at least: their deviation (benchmarks/window.py)."""


def predict(run_dir: Path, config: TrainConfig, fork: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, Any]:
    """The ledger's ``merged`` (the merged window's loss), ``predicted`` (that, corrected) and ``basis`` (in words).

    The window's blocks are those of the same steps, where the run has gone that far, else the newest up to the fork.

    Args:
        fork: a line of the ledger: from, decay_steps, curve.
        known: lines of ledgers, some with an outcome; never that of the fork itself.
    """
    step, decay_steps = fork["from"], fork["decay_steps"]
    blocks = [legible(path) for path in published_blocks(run_dir / "window")]
    inside = [block for block in blocks if step < block.first_step and block.last_step <= step + decay_steps]
    covered = sum(block.last_step - block.first_step + 1 for block in inside) >= 0.9 * decay_steps
    before = [block for block in blocks if step - decay_steps < block.first_step and block.last_step <= step]
    chosen = [block for block in (inside if covered else before) if not block.tainted]
    if len(chosen) < 2:
        return {"merged": None, "predicted": None, "basis": "no prediction: fewer than two blocks of that length"}
    for block in chosen:
        if problem := verify(run_dir / "window" / block.name, name=RECORD):
            raise UserError(f"{run_dir / 'window' / block.name} is damaged ({problem}); move it away to go on without it")
    merged = merged_loss(run_dir, config, chosen, fork["curve"])
    ratios = corrections(fork, known)
    basis = f"{chosen[0].name} to {chosen[-1].name}" + ("" if covered else ", which end where the decay begins")
    predicted = corrected(merged, ratios)
    if predicted != merged:
        basis += f", corrected by {len(ratios)} annealed forks"
    else:
        basis += f", uncorrected: the bias of {len(ratios)} annealed forks may be chance" if ratios else ", uncorrected"
    return {"merged": merged, "predicted": predicted, "basis": basis}


def corrections(fork: dict[str, Any], known: list[dict[str, Any]]) -> list[float]:
    """log(merged / outcome) of the annealed forks that are near: of the same curve, about as long, ending about there."""
    end = fork["from"] + fork["decay_steps"]
    return [
        math.log(line["merged"] / line["outcome"])
        for line in known
        if line.get("outcome") and line.get("merged") and line["curve"] == fork["curve"]
        if abs(line["from"] + line["decay_steps"] - end) <= NEAR * end
        if abs(line["decay_steps"] - fork["decay_steps"]) <= NEAR * fork["decay_steps"]
    ]


def corrected(merged: float, ratios: list[float]) -> float:
    """The merged loss without the mean bias of the forks that were annealed, shrunk as far as their scatter may explain it.

    Of a mean bias ``b`` of k forks that scatter by ``s`` the share ``max(0, 1 - s^2 / (k b^2))`` is taken out, as in the
    positive-part James-Stein estimate: two forks that are half a percent off by chance must not spoil a good prediction.
    """
    if not ratios:
        return merged
    bias = statistics.mean(ratios)
    scatter = max(SCATTER, statistics.stdev(ratios) if len(ratios) > 1 else 0.0)
    share = max(0.0, 1 - scatter**2 / (len(ratios) * bias**2)) if bias else 0.0
    return merged * math.exp(-share * bias)


def merged_loss(run_dir: Path, config: TrainConfig, blocks: list[Block], curve: str) -> float:
    """As the run itself evaluates, on the same held-out text."""
    import torch

    from distmerge.data.packed import open_corpus, sampled
    from distmerge.judge import Judge
    from distmerge.model import load_model

    if config.data.streaming:
        raise UserError("config.data.streaming must be false for a prediction, got true")
    model = load_model(str(run_dir / "window" / blocks[-1].name))
    views = {name: parameter.data for name, parameter in model.named_parameters()}
    with torch.no_grad():
        stored = [(run_dir / "window" / block.name, TENSORS) for block in blocks]
        merge_stored(stored, block_weights(curve, blocks), views)
    held_out = sampled(open_corpus(config.data).held_out, config.evaluate.sequences)
    return Judge(model, {"held out": held_out}, config.train.batch_size).losses()["held out"]
