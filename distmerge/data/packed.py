"""Text in, batches of token ids out: read and cached by ``datasets``, packed, held out, dealt to ranks.

Packed text, or examples one a row (:mod:`distmerge.data.instructions`). Indexed data: the position is a function of (seed,
step, mesh), so there is nothing to save. Streams: see :mod:`distmerge.data.streaming`.
"""

from __future__ import annotations

import functools
import glob
from collections.abc import Iterable
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from datasets.exceptions import DatasetGenerationError
from torch import Tensor
from transformers import ByT5Tokenizer, PreTrainedTokenizerBase

from distmerge.config.train import Data
from distmerge.data.instructions import example_rows
from distmerge.data.sources import data_files
from distmerge.errors import UserError
from distmerge.model import first_line, load_tokenizer, token_ids

datasets.disable_progress_bars()
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # its errors are told as ours

PIECE_CHARACTERS = 1 << 16
"""A longer document is cut at line ends into pieces of about this size: one file is corpus enough."""

CACHE_VERSION = 1
"""Part of the cache's key: raise it when cut() or pack() give other results."""


class Corpus(NamedTuple):
    """Packed sequences of ``sequence_length`` token ids each; those held out with ``bytes``, as :func:`packed` gives them."""

    train: datasets.Dataset
    held_out: datasets.Dataset


def open_corpus(section: Data) -> Corpus:
    """Read, cut, hold out, tokenize and pack; every step is cached on disk by ``datasets``."""
    instructions = section.format != "text"
    pieces = load_documents(section) if instructions else read_pieces(section)
    if len(pieces) < 2:
        cut = f"; text is cut into pieces of {PIECE_CHARACTERS:,} characters" if not instructions else ""
        raise UserError(f"config.data must hold at least 2 pieces of text, one of them held out, got {len(pieces)}{cut}")
    # A fixed seed: runs of different seeds are judged by the same text.
    order = np.random.Generator(np.random.Philox(0)).permutation(len(pieces))
    count = min(len(pieces) - 1, max(1, round(section.eval_fraction * len(pieces))))
    held_out, train = np.sort(order[:count]), np.sort(order[count:])
    if instructions:
        corpus = Corpus(*(example_rows(pieces.select(rows), section) for rows in (train, held_out)))
    else:
        corpus = Corpus(packed(pieces.select(train), section), packed(pieces.select(held_out), section, count_bytes=True))
    if len(corpus.held_out) == 0:
        raise UserError(
            f"config.data.eval_fraction must hold out at least one sequence of {section.sequence_length} tokens, "
            f"got {section.eval_fraction} of {len(pieces)} pieces"
        )
    return corpus if section.replay is None else corpus._replace(train=with_replay(corpus.train, section))


def with_replay(train: datasets.Dataset, section: Data) -> datasets.Dataset:
    """The training sequences with as many of another text among them as make up its share; drawn again where it is short."""
    assert section.replay is not None
    other = section.model_copy(update={"source": "files", "files": section.replay.files, "replay": None})
    drawn = open_corpus(other).train
    count = round(section.replay.share / (1 - section.replay.share) * len(train))
    if len(drawn) == 0 or count == 0:
        raise UserError(f"config.data.replay must give at least one sequence, got {count} of {len(drawn)}")
    order = np.random.Generator(np.random.Philox(1)).permutation(len(drawn))
    return datasets.concatenate_datasets([train, drawn.select(np.resize(order, count))]).with_format("numpy")


def sampled(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """The sequences that a model is judged on: ``count`` of them, or all where there are fewer, from anywhere in the text.

    They are the first of a fixed permutation, so a larger sample holds the smaller one. Nothing but the text decides which:
    all runs that hold out the same text are judged on the same sequences.
    """
    if count >= len(rows):
        return rows
    order = np.random.Generator(np.random.Philox(2)).permutation(len(rows))
    return rows.select(np.sort(order[:count]))


def packed_text(section: Data) -> datasets.Dataset:
    """All of the text, packed, with nothing held out: what ``distmerge eval --files`` reads."""
    if section.format != "text":
        return example_rows(load_documents(section), section)
    return packed(read_pieces(section), section, count_bytes=True)


def read_pieces(section: Data) -> datasets.Dataset:
    column = "text" if section.source == "stdlib" else section.column
    documents = load_documents(section)
    if column not in documents.column_names:
        raise UserError(f'config.data.column must be one of {", ".join(documents.column_names)}, got "{column}"')
    kind = getattr(documents.features[column], "dtype", "a table")
    if kind not in ("string", "large_string"):
        raise UserError(f'config.data.column must hold text, got {kind} in "{column}"')
    return documents.map(
        functools.partial(cut, column=column, version=CACHE_VERSION),
        batched=True,
        batch_size=64,
        remove_columns=documents.column_names,
    )


def load_documents(section: Data, streaming: bool = False) -> Any:
    """One row a document; lazily with ``streaming``."""
    load_dataset: Any = datasets.load_dataset  # its overloads take no bool for streaming
    try:
        if section.source == "hub":
            return load_dataset(section.dataset, section.name, split=section.split, streaming=streaming)
        loader, files = data_files(section)
        options: Any = {"sample_by": "document", "encoding_errors": "replace"} if loader == "text" else {}
        # It takes names for patterns.
        names = [glob.escape(file) for file in files]
        return load_dataset(loader, data_files=names, split="train", streaming=streaming, **options)
    except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
        raise unreadable(section, error) from None


def unreadable(section: Data, error: Exception) -> UserError:
    """What to say when ``datasets`` fails on the corpus."""
    if isinstance(error, UserError):
        return error
    names = section.dataset or ", ".join(section.files) or "the standard library"
    reason = "it has no rows" if isinstance(error, StopIteration) else first_line(error.__cause__ or error)
    return UserError(f"config.data: cannot read {names}: {reason}")


def cut(batch: dict[str, list[str | None]], column: str, version: int) -> dict[str, list]:
    """Documents as pieces of at most about PIECE_CHARACTERS, cut at line ends; ``ends`` marks a document's last."""
    texts: list[str] = []
    ends: list[bool] = []
    for document in batch[column]:
        if document is None:
            raise no_text(column)
        lines, size = [], 0
        for line in document.splitlines(keepends=True):
            if size + len(line) > PIECE_CHARACTERS and lines:
                texts.append("".join(lines))
                ends.append(False)
                lines, size = [], 0
            lines.append(line)
            size += len(line)
        texts.append("".join(lines))
        ends.append(True)
    return {"text": texts, "ends": ends}


def no_text(column: str) -> UserError:
    return UserError(f'config.data.column must hold text in every row, got none in a row of "{column}"')


def packed(pieces: datasets.Dataset, section: Data, count_bytes: bool = False) -> datasets.Dataset:
    """Rows of ``input_ids``, int32, cut from the pieces' tokens end to end.

    Args:
        count_bytes: also give ``bytes``, as :func:`pack` does, where the tokenizer can tell.
    """
    length = section.sequence_length
    count_bytes = count_bytes and knows_bytes(cached_tokenizer(section.tokenizer))
    features = {"input_ids": datasets.Sequence(datasets.Value("int32"), length=length)}
    features |= {"bytes": datasets.Value("int32")} if count_bytes else {}
    rows = pieces.map(
        functools.partial(
            pack, tokenizer=section.tokenizer, length=length, count_bytes=count_bytes, version=CACHE_VERSION
        ),
        batched=True, batch_size=1000, remove_columns=pieces.column_names, features=datasets.Features(features),
    )  # fmt: skip
    return rows.with_format("numpy")


def pack(batch: dict[str, list], tokenizer: str, length: int, count_bytes: bool, version: int) -> dict[str, Any]:
    """Token ids end to end, cut into rows of ``length``; what is left of a batch of 1000 pieces is dropped.

    ``bytes`` is how many bytes of text the tokens of a row stand for that a model predicts, all but the first.
    """
    ids = tokenize(cached_tokenizer(tokenizer), batch["text"], batch["ends"])
    stop = len(ids) // length * length
    rows = {"input_ids": ids[:stop].reshape(-1, length)}
    if not count_bytes:
        return rows
    counts = bytes_of_tokens(cached_tokenizer(tokenizer), batch["text"], batch["ends"])
    return rows | {"bytes": counts[:stop].reshape(-1, length)[:, 1:].sum(1)}


cached_tokenizer = functools.lru_cache(maxsize=2)(load_tokenizer)


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], ends: list[bool]) -> np.ndarray:
    """Token ids of all texts as one int32 vector, an end-of-text after each document."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = token_ids(tokenizer, texts)
    tail = np.asarray(end, dtype=np.int32)
    return np.concatenate([part for row, last in zip(ids, ends, strict=True) for part in (row, tail if last else tail[:0])])


def knows_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it can be told which bytes of a text each token stands for."""
    return isinstance(tokenizer, ByT5Tokenizer) or bool(tokenizer.is_fast)


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], ends: list[bool]) -> np.ndarray:
    """How many bytes of text, in UTF-8, each of the tokens that :func:`tokenize` gives stands for, as one vector.

    A token stands for the text from the last token's end to its own. So spaces that a tokenizer leaves out count with what
    follows, the first of several tokens of one character has all of it, and an end of text is no text.
    """
    parts: list[np.ndarray] = []
    for text, last in zip(texts, ends, strict=True):
        # The bytes before each character, and those of all.
        points = np.frombuffer(text.encode("utf-32-le", "replace"), dtype=np.uint32)
        before = np.concatenate([[0], np.cumsum(1 + (points >= 0x80) + (points >= 0x800) + (points >= 0x10000))])
        if isinstance(tokenizer, ByT5Tokenizer):
            parts.append(np.ones(before[-1], dtype=np.int64))
        else:
            offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
            stops = np.asarray([stop for _, stop in offsets], dtype=np.int64)  # pyright: ignore
            parts.append(np.diff(before[np.maximum.accumulate(stops)], prepend=0))
        if last and tokenizer.eos_token_id is not None:
            parts.append(np.zeros(1, dtype=np.int64))
    return np.concatenate(parts)


class IndexedBatches:
    """The training batches of one rank: a function of (seed, step) and its place, with no state.

    An epoch is a permutation of the sequences cut into global batches, so that no two ranks see the same sequence in
    it; what does not fill a global batch is left for another epoch's permutation.
    """

    def __init__(self, data: datasets.Dataset, seed: int, rank: int, world: int, micro_steps: int, batch_size: int):
        self.data, self.seed, self.rank, self.shape = data, seed, rank, (micro_steps, batch_size)
        self.own = micro_steps * batch_size
        self.together = self.own * world
        self.per_epoch = len(data) // self.together
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        if self.per_epoch == 0:
            raise UserError(
                f"config.data must hold at least one batch, {self.together} sequences "
                f"({world} ranks x {micro_steps} micro steps x {batch_size}), got {len(data)}"
            )

    def batch(self, step: int) -> Tensor:
        """``[micro_steps, batch_size, length]`` int64 token ids of inner step ``step``, counted from 0."""
        start = self._start(step) + self.rank * self.own
        rows = self.data[self._order[start : start + self.own]]["input_ids"]
        return torch.from_numpy(np.asarray(rows, dtype=np.int64)).view(*self.shape, -1)

    def _start(self, step: int) -> int:
        """Where the global batch of a step begins in its epoch's order, which is drawn."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.data))
        return position * self.together

    def count_tokens(self, steps: Iterable[int]) -> int:
        """Tokens that are no padding, of all ranks, in the batches of ``steps``."""
        if "tokens" not in self.data.column_names:
            length = len(self.data[:1]["input_ids"][0])
            return sum(self.together * length for _ in steps)
        counts = np.asarray(self.data["tokens"], dtype=np.int64)
        total = 0
        for step in steps:
            start = self._start(step)
            total += int(counts[self._order[start : start + self.together]].sum())
        return total

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
