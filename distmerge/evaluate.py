"""The loss of a model on held-out text, with its standard error."""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from transformers import ByT5Tokenizer

from distmerge.config.train import Data
from distmerge.data.loss_mask import IGNORED, ids_and_labels
from distmerge.data.packed import open_corpus, packed_text, sampled
from distmerge.data.streaming import stream_held_out
from distmerge.errors import UserError
from distmerge.model import check_fits, first_line, load_model, load_tokenizer


class Evaluation(NamedTuple):
    """What a model's loss on some sequences is.

    Attributes:
        loss: in nats per token, over all tokens that were predicted.
        tokens: how many those were.
        standard_error: of the loss, in nats per token; None for fewer than two sequences, or where the loss is not finite.
    """

    loss: float
    tokens: int
    standard_error: float | None


@torch.no_grad()
def evaluate(model: nn.Module, data: datasets.Dataset, batch_size: int, rank: int = 0, world: int = 1) -> Evaluation:
    """The loss over every sequence of ``data``, each judged once, whatever the batch size and the number of ranks.

    With several ranks it is a collective over all of them; each evaluates its own model on its batches, and all take as many
    forward passes, which are collectives where a model is sharded. The model's mode and all generators are left as they were.

    Args:
        data: rows with ``input_ids``; which rows stand for a text is :func:`distmerge.data.packed.sampled`'s to say.
        batch_size: sequences of one forward pass.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batches = math.ceil(len(data) / batch_size)
    # A row for each sequence: every rank fills in its own, so adding them up is exact, and the sum is always in one order.
    sums = torch.zeros(len(data), 2, dtype=torch.float64, device=device)
    for turn in range(math.ceil(batches / world)):
        index = turn * world + rank
        start = index * batch_size if index < batches else 0  # a rank without a batch of its own keeps the others company
        batch = torch.from_numpy(np.asarray(data[start : start + batch_size]["input_ids"], dtype=np.int64)).to(device)
        judged = loss_by_sequence(model, batch)
        if index < batches:
            sums[start : start + len(batch)] = judged
    if world > 1:
        dist.all_reduce(sums)
    model.train(was_training)
    return mean_over_tokens(sums.cpu())


def loss_by_sequence(model: nn.Module, batch: Tensor) -> Tensor:
    """``[batch, 2]`` float64: the loss of each sequence in nats, summed over the tokens that count, and their number."""
    ids, labels = ids_and_labels(batch)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.view(following.shape).double().sum(1), (following != IGNORED).sum(1).double()], 1)


def mean_over_tokens(sums: Tensor) -> Evaluation:
    """The loss per token of sequences that were judged one by one, ``[sequences, 2]`` as of :func:`loss_by_sequence`.

    The mean is a ratio of two sums, so its standard error is that of a ratio (Cochran, Sampling Techniques, chapter 6), with
    the sequences taken as drawn independently.
    """
    total, tokens = sums.sum(0).tolist()
    loss = total / tokens
    residuals = sums[:, 0] - loss * sums[:, 1]
    count = len(sums)
    known = count > 1 and math.isfinite(loss)
    error = math.sqrt(count / (count - 1) * residuals.square().sum().item()) / tokens if known else None
    return Evaluation(loss, int(tokens), error)


@dataclass(frozen=True)
class DirectoryEvaluation:
    """The loss of a model directory on text.

    Attributes:
        text: which text, in words.
        loss, standard_error: as in :class:`Evaluation`.
        sequences, tokens: how many were judged.
        bytes: of the text, where its length in bytes is known.
    """

    text: str
    loss: float
    standard_error: float | None
    sequences: int
    tokens: int
    bytes: int | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    @property
    def bits_per_byte(self) -> float | None:
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON has it."""
        line = {
            "text": self.text,
            "loss": self.loss,
            "loss_se": self.standard_error,
            "perplexity": self.perplexity,
            "sequences": self.sequences,
            "tokens": self.tokens,
        }
        return line if self.bytes is None else line | {"bytes": self.bytes, "bits_per_byte": self.bits_per_byte}


def evaluate_directory(path: str, files: list[str] | None, sequence_length: int | None, sequences: int) -> DirectoryEvaluation:
    """The loss of the HF model directory ``path`` on text.

    Args:
        files: text files, all of whose text may be drawn from; None for the text that the model's own run held out.
        sequence_length: tokens of a sequence; None for 128, or where there are no files for as many as in the model's run.
        sequences: how many are drawn.

    Raises:
        UserError: where there is no model, no text, or too little of it.
    """
    tokenizer = load_tokenizer(path)
    section = Data(source="files", files=files) if files else section_of(path)
    changes: dict[str, Any] = {"tokenizer": "bytes" if isinstance(tokenizer, ByT5Tokenizer) else path}
    changes |= {"sequence_length": sequence_length} if sequence_length else {}
    section = section.model_copy(update=changes)
    text = sampled(packed_text(section), sequences) if files else held_out_text(path, section, sequences)
    if len(text) == 0:
        raise UserError(f"--files must hold at least one sequence of {section.sequence_length} tokens")
    model = load_model(path)
    check_fits(model, tokenizer, section.sequence_length)
    found = evaluate(model, text, 8)
    size = int(np.sum(text["bytes"])) if "bytes" in text.column_names else None
    said = " ".join(files) if files else f"held out by {path}'s own run"
    return DirectoryEvaluation(said, found.loss, found.standard_error, len(text), found.tokens, size)


def section_of(path: str) -> Data:
    """The data that a model was trained on, as its ``training.json`` or the run directory around it tells.

    Raises:
        UserError: where nothing tells, or what tells cannot be read.
    """
    directory = Path(path).resolve()
    tables = [(directory / "training.json", lambda text: json.loads(text).get("data"))]
    tables += [(place / "config.toml", lambda text: tomllib.loads(text).get("data", {})) for place in directory.parents[:2]]
    for file, read in tables:
        if not file.is_file():
            continue
        try:
            table = read(file.read_text())
            if table is not None:
                return Data.model_validate(table)
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{file} does not tell what {path} was trained on ({first_line(error)}): give --files GLOB"
            ) from None
    raise UserError(f"--files must be given for {path}, since no training.json or config.toml says what text its run held out")


def held_out_text(path: str, section: Data, sequences: int) -> datasets.Dataset:
    """The sequences that the model's own run was judged on, if it drew as many."""
    try:
        if section.streaming:
            return stream_held_out(section, sequences)
        return sampled(open_corpus(section.model_copy(update={"replay": None})).held_out, sequences)
    except UserError as error:
        raise UserError(f"cannot read the text that {path} was trained on, give --files GLOB: {error}") from None
