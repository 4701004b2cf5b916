"""Streamed text: corpora that are read without an index. What a resume needs is saved state.

A rank reads a few shards (files, as a rule) in turn, and shuffles the documents a block at a time: the order of the shards and
that of each block are functions of the seed, the epoch and the block's number. So the state is where the block begins, and how
many of its documents were taken; a resume reads the block again. (``datasets`` itself shuffles through a buffer, whose contents
a resume loses: https://huggingface.co/docs/datasets/stream#save-a-dataset-checkpoint-and-resume-iteration.)

Which documents are held out is decided by a hash of their text, wherever they are.
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
"""Shards that are read in turn, so that a block mixes documents of several."""

BLOCK_CHARACTERS = 1 << 24
"""A block has no more text than about this, however many documents it might have."""

SCAN_CHARACTERS, SCAN_DOCUMENTS = 1 << 26, 100_000
"""How much of a stream is looked through for held-out text at each start: all of a corpus that is no larger."""


class Shard:
    """The rows of one shard, from a state on."""

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
        """``datasets`` does not tell the state of what it has not read from yet."""
        return self.state if self.rows is None else self.documents.state_dict()


class Interleaved:
    """The texts of some shards, from a few of them in turn; when one ends, the next takes its place.

    Raises:
        UserError: for a file that cannot be read to its end, and for a row without text.
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
    """The training batches of one rank, from its share of the stream's documents, shuffled; after the last one, a new epoch.

    The ranks share the shards out where they divide evenly; else each reads all shards and takes every so-many-th document.
    """

    def __init__(self, section: Data, seed: int, rank: int, world: int, micro_steps: int, batch_size: int):
        self.documents, self.section, self.seed = open_stream(section), section, seed
        self.shape = (micro_steps, batch_size)
        self.tokenizer = load_tokenizer(section.tokenizer)
        shards = [int(shard) for shard in np.random.default_rng([seed]).permutation(self.documents.num_shards)]
        apart = len(shards) % world == 0
        self.shards = shards[rank::world] if apart else shards
        self.offset, self.stride = (0, 1) if apart else (rank, world)
        self.epoch, self.block, self.taken = 0, 0, 0
        self.start: dict[str, Any] | None = None  # where the block begins; None at an epoch's beginning
        self.left = np.empty(0, dtype=np.int32)
        self.texts = self._texts()

    def _texts(self) -> Iterator[str]:
        """From the position on. The position is that after what was yielded last."""
        while True:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.shards))
            rows = Interleaved(self.documents, self.section, [self.shards[index] for index in order])
            if self.start is not None:
                rows.load_state_dict(self.start)
            # A block has a multiple of the stride, or is an epoch's last, so that the count begins again with each.
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
        """This rank's documents of the next block; none at the epoch's end."""
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
        position = {key: getattr(self, key) for key in ("epoch", "block", "taken", "start")}
        return position | {"left": torch.from_numpy(self.left.copy())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for key in ("epoch", "block", "taken", "start"):
            setattr(self, key, state[key])
        self.left = state["left"].numpy()
        self.texts = self._texts()


def open_stream(section: Data) -> datasets.IterableDataset:
    documents = load_documents(section, streaming=True)
    names = documents.column_names
    if names is not None and section.column not in names:
        raise UserError(f'config.data.column must be one of {", ".join(names)}, got "{section.column}"')
    return documents


def stream_held_out(section: Data, sequences: int) -> datasets.Dataset:
    """The sequences that a model is judged on: ``sequences`` of them, or all where there are fewer, drawn from the held-out
    documents by a hash of their token ids.

    Nothing but the text decides which. Of a corpus that is too large to be looked through (``SCAN_CHARACTERS``), they are drawn
    from the beginnings of some of its shards. No more than what is drawn is kept in memory.
    """
    documents, tokenizer = open_stream(section), load_tokenizer(section.tokenizer)
    order = np.random.default_rng(0).permutation(documents.num_shards)
    drawn: list[tuple[int, int, np.ndarray, int]] = []  # a heap: what is dropped next is its first
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
    """Those of the held-out documents that a look through the stream finds."""
    characters = 0
    for text in itertools.islice(texts, SCAN_DOCUMENTS):
        if held_out(text, texts.section.eval_fraction):
            yield text
        characters += len(text)
        if characters >= SCAN_CHARACTERS:
            return


def rows_of(texts: Iterator[str], section: Data, tokenizer: Any) -> Iterator[tuple[np.ndarray, int]]:
    """The texts' token ids end to end, int32, in rows, each with the bytes of text that all but its first token stand for."""
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
    """What the first rank drew, on all ranks: one of them reads the corpus for it."""
    told: list[Any] = [rows]
    dist.broadcast_object_list(told, 0)
    return told[0]


def held_out(text: str, fraction: float) -> bool:
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64
