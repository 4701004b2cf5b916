"""Compares models by their losses on text: the loss barrier between two of them, and the KL divergence of their predictions."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from distmerge.judge import Judge, holding, texts_of, tokenizer_of
from distmerge.merging.diagnosis import OnText, PairFigure
from distmerge.model import check_fits, load_model, load_tokenizer
from distmerge.rules.torch_typed import from_numpy

STEPS = (0.25, 0.5, 0.75)
"""Where the barrier is measured on the line between two models: the share of the second one."""

TEXT = "files"
"""The name of the only text on which everything is measured."""


def on_data(models: list[str], files: list[str], sequence_length: int, sequences: int) -> OnText:
    """Losses of experts, and the barrier and KL divergence of each pair of them.

    The barrier is ``max_a L(a) - ((1 - a) L(0) + a L(1))``, at least 0, where ``L(a)`` is the loss at share ``a`` of the
    straight line between two experts. Source: https://arxiv.org/abs/1912.05671

    Args:
        models: directories of the base, whose tokenizer is used, and of the experts. Pairs are indices into the experts.
        files: globs of the text.
    """
    texts = texts_of({TEXT: files}, tokenizer_of(models[0]), sequence_length, sequences, "--files")
    experts = [load_model(path) for path in models[1:]]
    check_fits(experts[0], load_tokenizer(models[0]), sequence_length)
    states = [expert.state_dict() for expert in experts]
    losses = [Judge(expert, texts).losses()[TEXT] for expert in experts]
    barriers: list[PairFigure] = []
    divergences: list[PairFigure] = []
    judge = Judge(load_model(models[1]), texts)
    for i, j in itertools.combinations(range(len(experts)), 2):
        heights: list[float] = []
        for share in STEPS:
            between = {key: torch.lerp(states[i][key], states[j][key], share) for key in states[i]}
            loss = judge.losses_of(holding(judge.model, between))[TEXT]
            heights.append(loss - (1 - share) * losses[i] - share * losses[j])
        barriers.append(PairFigure((i, j), max(0.0, *heights)))
        divergences.append(PairFigure((i, j), divergence(experts[i], experts[j], texts[TEXT])))
    return OnText(losses, barriers, divergences)


@torch.no_grad()
def divergence(one: torch.nn.Module, two: torch.nn.Module, text: Any) -> float:
    """The mean of KL(one | two) and KL(two | one) per token, in nats."""
    total, tokens = 0.0, 0
    for at in range(0, len(text), 8):
        batch = from_numpy(np.asarray(text[at : at + 8]["input_ids"], dtype=np.int64))
        p, q = (model.eval()(input_ids=batch, use_cache=False).logits.float().log_softmax(-1) for model in (one, two))
        total += float(((p.exp() - q.exp()) * (p - q)).sum(-1).double().sum()) / 2
        tokens += batch.numel()
    return total / tokens
