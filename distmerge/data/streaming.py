"""Streamed text: corpora that are read without an index. Checkpoints save the position in the stream.

A rank reads a few shards (usually files) in turn, and shuffles the documents block by block. The order of the shards and the
order within each block are functions of the seed, the epoch and the block's number. So the saved position consists of where the
block begins and how many of its documents were taken; a resumed run reads the block again. (``datasets`` itself shuffles
through a buffer, whose contents are lost on a resume:
https://huggingface.co/docs/datasets/stream#save-a-dataset-checkpoint-and-resume-iteration.)

Whether a document is held out depends on a hash of its text alone.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.config.train import Data
from distmerge.data.packed import bytes_of_tokens, knows_bytes, load_documents, no_text, tokenize, unreadable
from distmerge.errors import UserError
from distmerge.model import load_tokenizer

OPEN_SHARDS = 8
"""How many shards are read in turn, so that a block mixes documents of several."""

BLOCK_CHARACTERS = 1 << 24
"""A block ends at about this much text, even if it has fewer documents than ``shuffle_buffer``."""

SCAN_CHARACTERS, SCAN_DOCUMENTS = 1 << 26, 100_000
"""How much of a stream is scanned for held-out text at each start; a smaller corpus is scanned completely."""


class Shard:
    """The rows of one shard, from a saved state on."""

    def __init__(self, documents: datasets.IterableDataset, index: int, state: dict[str, Any] | None):
        self.index, self.state = index, state
        self.documents = documents.shard(documents.num_shards, index)
        if state is not None:
            self.documents.load_state_dict(state)
        self.rows: Iterator[Any] | None = None

    def next(self) -> dict[str, Any] | None:
        """The next row; None at the end."""
        if self.rows is None:
            self.rows = iter(self.documents)
        return next(self.rows, None)

    def state_dict(self) -> dict[str, Any] | None:
        """The position. Before the first row it is the one that was loaded, since ``datasets`` knows a state only after it."""
        return self.state if self.rows is None else self.documents.state_dict()


class Interleaved:
    """The texts of some shards, read from a few of them in turn; when one ends, the next one takes its place.

    Raises:
        UserError: while iterating, for a file that cannot be read or a row without text.
    """

    def __init__(self, documents: datasets.IterableDataset, section: Data, order: list[int]):
        self.documents, self.section, self.order = documents, section, order
        self.opened, self.turn = 0, 0
        self.shards: list[Shard] = []

    def __iter__(self) -> Iterator[str]:
        while True:
            while len(self.shards) < OPEN_SHARDS and self.opened < len(self.order):
                self.shards.append(Shard(self.documents, self.order[self.opened], None))
                self.opened += 1
            if not self.shards:
                return
            self.turn %= len(self.shards)
            try:
                row = self.shards[self.turn].next()
            except (OSError, ValueError) as error:
                raise unreadable(self.section, error) from None
            if row is None:
                del self.shards[self.turn]
                continue
            self.turn += 1
            if not isinstance(text := row.get(self.section.column), str):
                raise no_text(self.section.column)
            yield text

    def state_dict(self) -> dict[str, Any]:
        shards = [(shard.index, shard.state_dict()) for shard in self.shards]
        return {"opened": self.opened, "turn": self.turn, "shards": shards}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.opened, self.turn = state["opened"], state["turn"]
        self.shards = [Shard(self.documents, index, rows) for index, rows in state["shards"]]


class StreamBatches:
    """The training batches of one rank, from its share of the stream's documents, shuffled, over any number of epochs.

    If the number of shards is a multiple of the number of ranks, each rank reads shards of its own. Otherwise every rank reads
    all shards and takes every ``world``-th document.
    """

    def __init__(self, section: Data, seed: int, rank: int, world: int, micro_steps: int, batch_size: int):
        self.documents, self.section, self.seed = open_stream(section), section, seed
        self.shape = (micro_steps, batch_size)
        self.tokenizer = load_tokenizer(section.tokenizer)
        shards = [int(shard) for shard in np.random.default_rng([seed]).permutation(self.documents.num_shards)]
        divisible = len(shards) % world == 0
        self.shards = shards[rank::world] if divisible else shards
        self.offset, self.stride = (0, 1) if divisible else (rank, world)
        self.epoch, self.block, self.taken = 0, 0, 0
        self.start: dict[str, Any] | None = None  # where the block begins; None at an epoch's beginning
        self.left = np.empty(0, dtype=np.int32)
        self.texts = self._texts()

    def _texts(self) -> Iterator[str]:
        """The texts from the position on; the position is always that after the text that was yielded last."""
        while True:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.shards))
            rows = Interleaved(self.documents, self.section, [self.shards[index] for index in order])
            if self.start is not None:
                rows.load_state_dict(self.start)
            # Each block begins at a multiple of the stride, since only the last block of an epoch may end between two.
            own = (text for text in rows if not held_out(text, self.section.eval_fraction))
            while block := self._read_block(own):
                shuffled = np.random.default_rng([self.seed, self.epoch, self.block]).permutation(len(block))
                for index in shuffled[self.taken :]:
                    self.taken += 1
                    yield block[index]
                self.start, self.block, self.taken = rows.state_dict(), self.block + 1, 0
            if self.block == 0:
                raise UserError("config.data: this rank's share of the stream holds no training document")
            self.start, self.epoch, self.block, self.taken = None, self.epoch + 1, 0, 0

    def _read_block(self, texts: Iterator[str]) -> list[str]:
        """This rank's documents of the next block; [] at the end of the epoch."""
        block: list[str] = []
        characters = 0
        while len(block) < self.section.shuffle_buffer and characters < BLOCK_CHARACTERS:
            turn = list(itertools.islice(texts, self.stride))
            if len(turn) <= self.offset:
                break
            block.append(turn[self.offset])
            characters += sum(map(len, turn))
        return block

    def batch(self, step: int) -> Tensor:
        """The next token ids, ``[micro_steps, batch_size, length]`` int64. Steps must be requested in order."""
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
        """The number of this rank's tokens in the batches of ``steps``."""
        return sum(self.shape[0] * self.shape[1] * self.section.sequence_length for _ in steps)

    def state_dict(self) -> dict[str, Any]:
        position = {key: getattr(self, key) for key in ("epoch", "block", "taken", "start")}
        return position | {"left": torch.from_numpy(self.left.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("epoch", "block", "taken", "start"):
            setattr(self, key, state[key])
        self.left = state["left"].numpy()
        self.texts = self._texts()


def open_stream(section: Data) -> datasets.IterableDataset:
    """The corpus as a stream of documents.

    Raises:
        UserError: when it cannot be opened, or lacks the column.
    """
    documents = load_documents(section, streaming=True)
    names = documents.column_names
    if names is not None and section.column not in names:
        raise UserError(f'config.data.column must be one of {", ".join(names)}, got "{section.column}"')
    return documents


def stream_held_out(section: Data, sequences: int) -> datasets.Dataset:
    """The sequences for evaluation: ``sequences`` of them, or all if there are fewer, drawn from the held-out documents by a
    hash of their token ids, so that they depend on the text alone.

    From a corpus that is too large to be scanned completely (``SCAN_CHARACTERS``), they are drawn from the beginnings of some
    of its shards. Only the drawn sequences are kept in memory.

    Raises:
        UserError: when no sequence is held out.
    """
    documents, tokenizer = open_stream(section), load_tokenizer(section.tokenizer)
    order = np.random.default_rng(0).permutation(documents.num_shards)
    drawn: list[tuple[int, int, np.ndarray, int]] = []  # a heap: its first item is the one to be replaced next
    for index, (row, count) in enumerate(
        rows_of(held_out_texts(Interleaved(documents, section, order.tolist())), section, tokenizer)
    ):
        place = -int.from_bytes(hashlib.blake2b(row.tobytes(), digest_size=8).digest(), "big")
        (heapq.heappush if len(drawn) < sequences else heapq.heappushpop)(drawn, (place, -index, row, count))
    if not drawn:
        raise UserError(f"config.data.eval_fraction must hold out at least one sequence, got {section.eval_fraction}")
    drawn.sort(key=lambda item: -item[1])
    columns: dict[str, Any] = {"input_ids": np.stack([row for *_, row, _ in drawn])}
    columns |= {"bytes": [count for *_, count in drawn]} if knows_bytes(tokenizer) else {}
    return datasets.Dataset.from_dict(columns).with_format("numpy")


def held_out_texts(texts: Interleaved) -> Iterator[str]:
    """The held-out documents in the part of the stream that is scanned."""
    characters = 0
    for text in itertools.islice(texts, SCAN_DOCUMENTS):
        if held_out(text, texts.section.eval_fraction):
            yield text
        characters += len(text)
        if characters >= SCAN_CHARACTERS:
            return


def rows_of(texts: Iterator[str], section: Data, tokenizer: Any) -> Iterator[tuple[np.ndarray, int]]:
    """Rows of the texts' concatenated token ids, int32 ``[length]`` each, with the bytes of text that all tokens but the first
    stand for (0 where the tokenizer cannot say)."""
    length = section.sequence_length
    ids, counts = np.empty(0, dtype=np.int32), np.empty(0, dtype=np.int64)
    while some := list(itertools.islice(texts, 64)):
        ends = [True] * len(some)
        ids = np.concatenate([ids, tokenize(tokenizer, some, ends)])
        more = bytes_of_tokens(tokenizer, some, ends) if knows_bytes(tokenizer) else np.zeros(len(ids) - len(counts), np.int64)
        counts = np.concatenate([counts, more])
        stop = len(ids) // length * length
        for start in range(0, stop, length):
            yield ids[start : start + length], int(counts[start + 1 : start + length].sum())
        ids, counts = ids[stop:], counts[stop:]


def from_lead(rows: datasets.Dataset | None) -> datasets.Dataset:
    """The first rank's sequences, on all ranks, so that only one rank scans the corpus. A collective."""
    objects: list[Any] = [rows]
    dist.broadcast_object_list(objects, 0)
    return objects[0]


def held_out(text: str, fraction: float) -> bool:
    """Whether a document is held out: about the share ``fraction`` of all documents is, by a hash of the text."""
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
