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
    """A model's loss on some sequences.

    Attributes:
        loss: mean over all predicted tokens, in nats per token.
        tokens: number of predicted tokens.
        standard_error: standard error of the loss in nats per token. None for fewer than two sequences, or if the loss is not
            finite.
    """

    loss: float
    tokens: int
    standard_error: float | None


@torch.no_grad()
def evaluate(model: nn.Module, data: datasets.Dataset, batch_size: int, rank: int = 0, world: int = 1) -> Evaluation:
    """The loss over all sequences of ``data``. Each is evaluated once, for any batch size and number of ranks.

    With several ranks this is a collective over all of them: each evaluates its own model on a share of the batches, with the
    same number of forward passes, since those are collectives if a model is sharded. The model's training mode is restored, and
    no random generator is used.

    Args:
        data: rows with ``input_ids``, such as :func:`distmerge.data.packed.sampled` draws from a text.
        batch_size: sequences per forward pass.
        rank, world: this rank, and the number of ranks.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    batches = math.ceil(len(data) / batch_size)
    # Each rank fills in the rows of its own sequences, so the all-reduce only adds zeros. It is exact, and the final sum is
    # always taken in the same order.
    sums = torch.zeros(len(data), 2, dtype=torch.float64, device=device)
    for turn in range(math.ceil(batches / world)):
        index = turn * world + rank
        start = index * batch_size if index < batches else 0  # a rank without a batch takes part in the others' collectives
        batch = torch.from_numpy(np.asarray(data[start : start + batch_size]["input_ids"], dtype=np.int64)).to(device)
        losses = loss_by_sequence(model, batch)
        if index < batches:
            sums[start : start + len(batch)] = losses
    if world > 1:
        dist.all_reduce(sums)
    model.train(was_training)
    return mean_over_tokens(sums.cpu())


def loss_by_sequence(model: nn.Module, batch: Tensor) -> Tensor:
    """For each sequence the sum of its tokens' losses in nats and the number of tokens that count, ``[batch, 2]`` float64.

    Args:
        batch: ``[batch, length]`` token ids, see :mod:`distmerge.data.loss_mask`.
    """
    ids, labels = ids_and_labels(batch)
    logits = model(input_ids=ids, use_cache=False).logits.float()
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    losses = functional.cross_entropy(logits.flatten(0, 1), following.flatten(), ignore_index=IGNORED, reduction="none")
    return torch.stack([losses.view(following.shape).double().sum(1), (following != IGNORED).sum(1).double()], 1)


def mean_over_tokens(sums: Tensor) -> Evaluation:
    """The mean loss per token, with its standard error.

    The mean is a ratio of two sums, so its standard error is that of a ratio estimator (Cochran, Sampling Techniques,
    chapter 6), which treats the sequences as independent draws.

    Args:
        sums: ``[sequences, 2]``, as from :func:`loss_by_sequence`.
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
        text: a description of the text.
        loss, standard_error: as in :class:`Evaluation`.
        sequences: number of sequences.
        tokens: number of predicted tokens.
        bytes: length of the text in bytes, if it is known.
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
        """The result as a JSON object."""
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
        files: globs of text files, from all of which sequences are drawn; None for the text that the model's own run held out.
        sequence_length: tokens per sequence. By default 128 with ``files``, else as in the model's run.
        sequences: number of sequences to draw.

    Raises:
        UserError: if there is no model, no text, or too little text.
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
    description = " ".join(files) if files else f"held out by {path}'s own run"
    return DirectoryEvaluation(description, found.loss, found.standard_error, len(text), found.tokens, size)


def section_of(path: str) -> Data:
    """The [data] section with which a model was trained, from its ``training.json`` or the ``config.toml`` of the run directory
    that it is in.

    Raises:
        UserError: if there is neither file, or it cannot be read.
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
            raise UserError(f"{file} does not describe the data of {path} ({first_line(error)}): give --files GLOB") from None
    raise UserError(f"--files must be given for {path}, since no training.json or config.toml says what text its run held out")


def held_out_text(path: str, section: Data, sequences: int) -> datasets.Dataset:
    """Sequences of the text that the model's own run held out; those of its evaluations if the number is the same."""
    try:
        if section.streaming:
            return stream_held_out(section, sequences)
        return sampled(open_corpus(section.model_copy(update={"replay": None})).held_out, sequences)
    except UserError as error:
        raise UserError(f"cannot read the text that {path} was trained on, give --files GLOB: {error}") from None
