"""Predicts the loss that annealing a run would reach, before it is annealed.

The run's window over the same steps, merged by the same curve, stands for the decay (WSM, https://arxiv.org/abs/2507.17634).
Its loss is off by a few tenths of a percent to 2.5%: a long window lags behind a decay, and a short one averages out more noise
than a short decay. The bias depends on where in training the fork lies and how long it is, and varies with the seed by half a
percent. Therefore it is corrected by forks that were actually annealed, at about the same place and over about the same length,
from this run or from one that differs by its seed alone. Forks farther away do not help: over a third of a run the bias changed
by more than a percent (benchmarks/window.py).
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.files.directories import verify
from distmerge.windows.blocks import RECORD, TENSORS, Block, block_weights, load_block, merge_stored, published_blocks

NEAR = 0.1
"""A fork corrects another one only if its end and its length differ from those of the other by at most this share."""

SCATTER = 0.005
"""Lower bound of the standard deviation of the bias between forks that differ by their seed alone (benchmarks/window.py)."""


def predict(run_dir: Path, config: TrainConfig, fork: dict[str, Any], known: list[dict[str, Any]]) -> dict[str, Any]:
    """Predict the outcome of a fork.

    The merged blocks are those over the decay's steps if the run has gone that far, else as many before the fork.

    Args:
        fork: a line of the ledger: from, decay_steps, curve.
        known: lines of ledgers, some of them with an outcome; the fork's own line must not be among them.

    Returns:
        the ledger's ``merged`` (the loss of the merged window), ``predicted`` (the same with its bias corrected) and ``basis``
        (what the prediction is based on, in words).

    Raises:
        UserError: if a block is damaged.
    """
    step, decay_steps = fork["from"], fork["decay_steps"]
    blocks = [load_block(path) for path in published_blocks(run_dir / "window")]
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
    basis = f"{chosen[0].name} to {chosen[-1].name}" + ("" if covered else ", which end where the decay would begin")
    predicted = corrected(merged, ratios)
    if predicted != merged:
        basis += f", corrected by {len(ratios)} annealed forks"
    else:
        basis += f", uncorrected since the bias of {len(ratios)} annealed forks may be chance" if ratios else ", uncorrected"
    return {"merged": merged, "predicted": predicted, "basis": basis}


def corrections(fork: dict[str, Any], known: list[dict[str, Any]]) -> list[float]:
    """log(merged / outcome) of the annealed forks that are similar: by the same curve, about as long, and with about the same
    end."""
    end = fork["from"] + fork["decay_steps"]
    return [
        math.log(line["merged"] / line["outcome"])
        for line in known
        if line.get("outcome") and line.get("merged") and line["curve"] == fork["curve"]
        if abs(line["from"] + line["decay_steps"] - end) <= NEAR * end
        if abs(line["decay_steps"] - fork["decay_steps"]) <= NEAR * fork["decay_steps"]
    ]


def corrected(merged: float, ratios: list[float]) -> float:
    """The merged loss minus the mean bias of the annealed forks, shrunk as far as their scatter may explain it.

    If the biases of k forks have the mean ``b`` and the standard deviation ``s``, the share ``max(0, 1 - s^2 / (k b^2))`` of
    the bias is removed, as in the positive-part James-Stein estimator: two forks that are half a percent off by chance must not
    spoil a good prediction. For example, of one fork's bias of 2% with s = 0.5% the share 1 - 1/16 = 94% is removed.
    """
    if not ratios:
        return merged
    bias = statistics.mean(ratios)
    scatter = max(SCATTER, statistics.stdev(ratios) if len(ratios) > 1 else 0.0)
    share = max(0.0, 1 - scatter**2 / (len(ratios) * bias**2)) if bias else 0.0
    return merged * math.exp(-share * bias)


def merged_loss(run_dir: Path, config: TrainConfig, blocks: list[Block], curve: str) -> float:
    """The loss of the merged blocks on the run's held-out text, evaluated as in the run itself.

    Raises:
        UserError: for a run on streamed data.
    """
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
