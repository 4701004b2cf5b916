"""Streamed text: corpora that are read in order, without an index. The position is saved state."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from torch import Tensor

from distmerge.config import Data
from distmerge.data import load_documents, no_text, tokenize, unreadable
from distmerge.errors import UserError
from distmerge.model import load_tokenizer


class StreamBatches:
    """The training batches of one rank, from its share of the stream's documents; after the last one, from the first."""

    def __init__(self, documents: datasets.IterableDataset, section: Data, micro_steps: int, batch_size: int):
        self.documents, self.section, self.shape = documents, section, (micro_steps, batch_size)
        self.tokenizer = load_tokenizer(section.tokenizer)
        self.left = np.empty(0, dtype=np.int32)
        self.texts = self._texts()

    def _texts(self) -> Iterator[str]:
        while True:
            found = False
            for text in texts_of(self.documents, self.section):
                if not held_out(text, self.section.eval_fraction):
                    found = True
                    yield text
            self.documents.load_state_dict({})  # or each epoch after a resume would begin where the resume did
            if not found:
                raise UserError("config.data: this rank's share of the stream holds no training document")

    def batch(self, step: int) -> Tensor:
        """``[micro_steps, batch_size, length]`` int64: the next token ids. Steps must be asked for in order."""
        length = self.section.sequence_length
        wanted = self.shape[0] * self.shape[1] * length
        parts, count = [self.left], len(self.left)
        while count < wanted:
            parts.append(tokenize(self.tokenizer, [next(self.texts)], [True]))
            count += len(parts[-1])
        tokens = np.concatenate(parts)
        self.left = tokens[wanted:]
        return torch.from_numpy(tokens[:wanted].astype(np.int64)).view(*self.shape, length)

    def count_tokens(self, steps: Iterable[int]) -> int:
        """Tokens of this rank in as many steps."""
        return sum(self.shape[0] * self.shape[1] * self.section.sequence_length for _ in steps)

    def state_dict(self) -> dict[str, Any]:
        return {"documents": self.documents.state_dict(), "left": torch.from_numpy(self.left.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.documents.load_state_dict(state["documents"])
        self.left = state["left"].numpy()
        self.texts = self._texts()


def stream_corpus(
    section: Data, rank: int, world: int, micro_steps: int, batch_size: int, eval_sequences: int
) -> tuple[StreamBatches, datasets.Dataset]:
    """This rank's stream, and the first held-out sequences: documents are held out by a hash of their text."""
    documents = load_documents(section, streaming=True)
    names = documents.column_names
    if names is not None and section.column not in names:
        raise UserError(f'config.data.column must be one of {", ".join(names)}, got "{section.column}"')
    tokenizer, length = load_tokenizer(section.tokenizer), section.sequence_length
    texts: list[str] = []
    count = 0
    for text in texts_of(documents, section):
        if held_out(text, section.eval_fraction):
            texts.append(text)
            count += len(tokenize(tokenizer, texts[-1:], [True]))
            if count >= eval_sequences * length:
                break
    if count < length:
        raise UserError(f"config.data.eval_fraction must hold out at least one sequence, got {section.eval_fraction}")
    tokens = tokenize(tokenizer, texts, [True] * len(texts))
    rows = tokens[: len(tokens) // length * length].reshape(-1, length)
    sequences = datasets.Dataset.from_dict({"input_ids": rows}).with_format("numpy")
    own = split_dataset_by_node(documents, rank=rank, world_size=world)
    return StreamBatches(own, section, micro_steps, batch_size), sequences


def texts_of(documents: datasets.IterableDataset, section: Data) -> Iterator[str]:
    """The documents' texts, in order.

    Raises:
        UserError: for a file that cannot be read to its end, and for a row without text.
    """
    try:
        for row in documents:
            if not isinstance(row[section.column], str):
                raise no_text(section.column)
            yield row[section.column]
    except (OSError, ValueError) as error:
        raise unreadable(section, error) from None


def held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
