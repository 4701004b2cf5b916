"""What the loss says about merging: the barrier between two models, and how far apart their predictions are."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from distmerge.config.train import Data
from distmerge.data.packed import packed_text, sampled
from distmerge.errors import UserError
from distmerge.evaluate import evaluate
from distmerge.merging.diagnosis import OnText, PairFigure
from distmerge.model import check_fits, load_model, load_tokenizer

STEPS = (0.25, 0.5, 0.75)


def on_data(models: list[str], files: list[str], sequence_length: int, sequences: int) -> OnText:
    """Barriers ``max_a L(a) - lerp(L0, L1)`` along the line, and KL divergences, between each pair of experts.

    Args:
        models: the base, whose tokenizer is taken, and the experts. Pairs are indices into the experts.
    """
    from transformers import ByT5Tokenizer

    tokenizer = load_tokenizer(models[0])
    kind = "bytes" if isinstance(tokenizer, ByT5Tokenizer) else models[0]
    text = sampled(packed_text(Data(tokenizer=kind, sequence_length=sequence_length, source="files", files=files)), sequences)
    if len(text) == 0:
        raise UserError(f"--files must hold at least one sequence of {sequence_length} tokens")
    experts = [load_model(path) for path in models[1:]]
    check_fits(experts[0], tokenizer, sequence_length)
    states = [{key: value.clone() for key, value in expert.state_dict().items()} for expert in experts]
    losses = [evaluate(expert, text, 8).loss for expert in experts]
    barriers: list[PairFigure] = []
    divergences: list[PairFigure] = []
    line = load_model(models[1])
    for i, j in itertools.combinations(range(len(experts)), 2):
        heights: list[float] = []
        for share in STEPS:
            line.load_state_dict({key: torch.lerp(states[i][key], states[j][key], share) for key in states[i]})
            heights.append(evaluate(line, text, 8).loss - (1 - share) * losses[i] - share * losses[j])
        barriers.append(PairFigure((i, j), max(0.0, *heights)))
        divergences.append(PairFigure((i, j), divergence(experts[i], experts[j], text)))
    return OnText(losses, barriers, divergences)


@torch.no_grad()
def divergence(one: torch.nn.Module, two: torch.nn.Module, text: Any) -> float:
    """The mean of KL(one | two) and KL(two | one) over the tokens, nats."""
    total, tokens = 0.0, 0
    for at in range(0, len(text), 8):
        batch = torch.from_numpy(np.asarray(text[at : at + 8]["input_ids"], dtype=np.int64))
        p, q = (model.eval()(input_ids=batch, use_cache=False).logits.float().log_softmax(-1) for model in (one, two))
        total += float(((p.exp() - q.exp()) * (p - q)).sum(-1).double().sum()) / 2
        tokens += batch.numel()
    return total / tokens
