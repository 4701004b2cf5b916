"""The loss of a model on held-out text."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import ByT5Tokenizer

from distmerge.config import Data
from distmerge.data import open_corpus, packed_text
from distmerge.errors import UserError
from distmerge.labels import ids_and_labels, predicted
from distmerge.model import check_fits, load_model, load_tokenizer


class Evaluation(NamedTuple):
    """Attributes: loss in nats per token; tokens that were predicted."""

    loss: float
    tokens: int


@torch.no_grad()
def evaluate(
    model: nn.Module, data: datasets.Dataset, batch_size: int, batches: int, rank: int = 0, world: int = 1
) -> Evaluation:
    """The mean loss over the first ``batches`` batches of ``data``, dealt to the ranks.

    With several ranks it is a collective over all of them; each evaluates its own model on its batches, and all take as many
    forward passes, which are collectives where a model is sharded. The model's mode and all generators are left as they were.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    last = min(batches, math.ceil(len(data) / batch_size))
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    for turn in range(math.ceil(last / world)):
        index = turn * world + rank
        beyond = index >= last
        start = 0 if beyond else index * batch_size
        rows: Any = data[start : start + batch_size]["input_ids"]
        batch = torch.from_numpy(np.asarray(rows, dtype=np.int64)).to(device)
        ids, labels = ids_and_labels(batch)
        count = torch.zeros((), dtype=torch.int64, device=device) if beyond else predicted(batch)
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        sums += torch.stack([torch.where(count > 0, loss.double() * count, 0.0), count.double()])
    if world > 1:
        dist.all_reduce(sums)
    model.train(was_training)
    total, tokens = sums.tolist()
    return Evaluation(total / tokens, int(tokens))


def evaluate_directory(path: str, files: list[str] | None, sequence_length: int, batches: int) -> dict[str, Any]:
    """What ``distmerge eval`` prints, for the HF model directory ``path``.

    Text files are read whole; without any, the standard library's held-out share.
    """
    tokenizer = load_tokenizer(path)
    keys: dict[str, Any] = {"source": "files", "files": files} if files else {}
    section = Data(tokenizer="bytes" if isinstance(tokenizer, ByT5Tokenizer) else path, sequence_length=sequence_length, **keys)
    text = packed_text(section) if files else open_corpus(section).held_out
    if len(text) == 0:
        raise UserError(f"--files must hold at least one sequence of {sequence_length} tokens")
    model = load_model(path)
    check_fits(model, tokenizer, sequence_length)
    result = evaluate(model, text, 8, batches)
    line = {"loss": result.loss, "perplexity": math.exp(min(result.loss, 700)), "tokens": result.tokens}
    return line | ({"bits_per_byte": result.loss / math.log(2)} if isinstance(tokenizer, ByT5Tokenizer) else {})
