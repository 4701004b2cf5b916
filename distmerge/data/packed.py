"""Indexed data: text that ``datasets`` reads and caches is packed into sequences, partly held out, and dealt to the ranks.

The rows are packed text, or single examples (:mod:`distmerge.data.instructions`). The position in the data is a function of
(seed, step, mesh), so that checkpoints need not save it. For streams see :mod:`distmerge.data.streaming`.
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
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # unreadable() turns its errors into the user's

PIECE_CHARACTERS = 1 << 16
"""Longer documents are cut at line ends into pieces of about this size, so that a single file is enough for a corpus."""

CACHE_VERSION = 1
"""Part of the cache's key: raise it when the results of cut() or pack() change."""


class Corpus(NamedTuple):
    """Rows of ``sequence_length`` token ids each, as :func:`packed` gives them; held-out text with ``bytes``."""

    train: datasets.Dataset
    held_out: datasets.Dataset


def open_corpus(section: Data) -> Corpus:
    """Read a corpus, cut it into pieces, hold some of them out, tokenize and pack; ``datasets`` caches every step on disk.

    Raises:
        UserError: when the data cannot be read, or is too little to hold anything out.
    """
    instructions = section.format != "text"
    pieces = load_documents(section) if instructions else read_pieces(section)
    if len(pieces) < 2:
        cut = f"; text is cut into pieces of {PIECE_CHARACTERS:,} characters" if not instructions else ""
        raise UserError(f"config.data must hold at least 2 pieces of text, one of them held out, got {len(pieces)}{cut}")
    # The seed is fixed, so that runs with different seeds are evaluated on the same text.
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
    """The training sequences together with so many from another text that these make up ``replay.share`` of all. If the other
    text has too few, they are repeated."""
    assert section.replay is not None
    other = section.model_copy(update={"source": "files", "files": section.replay.files, "replay": None})
    drawn = open_corpus(other).train
    count = round(section.replay.share / (1 - section.replay.share) * len(train))
    if len(drawn) == 0 or count == 0:
        raise UserError(f"config.data.replay must give at least one sequence, got {count} of {len(drawn)}")
    order = np.random.Generator(np.random.Philox(1)).permutation(len(drawn))
    return datasets.concatenate_datasets([train, drawn.select(np.resize(order, count))]).with_format("numpy")


def sampled(rows: datasets.Dataset, count: int) -> datasets.Dataset:
    """The sequences for evaluation: ``count`` of them from anywhere in the text, or all if there are fewer.

    They are the first of a fixed permutation, so that a larger sample contains the smaller ones. They depend on the text alone:
    all runs that hold out the same text are evaluated on the same sequences.
    """
    if count >= len(rows):
        return rows
    order = np.random.Generator(np.random.Philox(2)).permutation(len(rows))
    return rows.select(np.sort(order[:count]))


def packed_text(section: Data) -> datasets.Dataset:
    """The whole text, packed, with nothing held out, for ``distmerge eval --files``."""
    if section.format != "text":
        return example_rows(load_documents(section), section)
    return packed(read_pieces(section), section, count_bytes=True)


def read_pieces(section: Data) -> datasets.Dataset:
    """The documents cut into pieces, as :func:`cut` gives them.

    Raises:
        UserError: when the column is missing or does not hold text.
    """
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
    """The corpus with one row for each document; with ``streaming``, rows are read lazily."""
    load_dataset: Any = datasets.load_dataset  # its overloads take no bool for streaming
    try:
        if section.source == "hub":
            return load_dataset(section.dataset, section.name, split=section.split, streaming=streaming)
        loader, files = data_files(section)
        options: Any = {"sample_by": "document", "encoding_errors": "replace"} if loader == "text" else {}
        # load_dataset takes file names as glob patterns.
        names = [glob.escape(file) for file in files]
        return load_dataset(loader, data_files=names, split="train", streaming=streaming, **options)
    except (OSError, ValueError, StopIteration, DatasetGenerationError) as error:
        raise unreadable(section, error) from None


def unreadable(section: Data, error: Exception) -> UserError:
    """The user's error for a failure of ``datasets`` on the corpus."""
    if isinstance(error, UserError):
        return error
    names = section.dataset or ", ".join(section.files) or "the standard library"
    reason = "it has no rows" if isinstance(error, StopIteration) else first_line(error.__cause__ or error)
    return UserError(f"config.data: cannot read {names}: {reason}")


def cut(batch: dict[str, list[str | None]], column: str, version: int) -> dict[str, list]:
    """Documents as pieces of about PIECE_CHARACTERS at most, cut at line ends; ``ends`` marks the last piece of a document."""
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
    """Rows of ``input_ids``, int32, cut from the tokens of the concatenated pieces.

    Args:
        count_bytes: add ``bytes``, as :func:`pack` does, if the tokenizer can map tokens to bytes.
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
    """Concatenate the pieces' token ids and cut them into rows of ``length``; the rest of a batch of 1000 pieces is dropped.

    ``bytes`` is the number of bytes of text that a row's predicted tokens, all but the first, stand for.
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
    """The token ids of all texts as one int32 vector, with an end-of-text token after each document.

    Args:
        ends: of each text, whether it is the last piece of a document.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = token_ids(tokenizer, texts)
    tail = np.asarray(end, dtype=np.int32)
    return np.concatenate([part for row, last in zip(ids, ends, strict=True) for part in (row, tail if last else tail[:0])])


def knows_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer can say which bytes of a text each token stands for."""
    return isinstance(tokenizer, ByT5Tokenizer) or bool(tokenizer.is_fast)


def bytes_of_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], ends: list[bool]) -> np.ndarray:
    """The number of bytes of UTF-8 text that each of :func:`tokenize`'s tokens stands for, as one vector.

    A token stands for the text from the previous token's end to its own end. So spaces that a tokenizer skips count with the
    next token, the first of several tokens for one character gets all of its bytes, and an end-of-text token gets none.
    """
    parts: list[np.ndarray] = []
    for text, last in zip(texts, ends, strict=True):
        # The number of bytes before each character and, as the last element, of the whole text.
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
    """The training batches of one rank: a function of the seed, the step and the rank, without state.

    An epoch is a permutation of the sequences, cut into global batches, so that each sequence is seen at most once by all ranks
    together. Sequences that do not fill a global batch are left out of the epoch.

    Raises:
        UserError: when the data does not fill one global batch.
    """

    def __init__(self, data: datasets.Dataset, seed: int, rank: int, world: int, micro_steps: int, batch_size: int):
        self.data, self.seed, self.rank, self.shape = data, seed, rank, (micro_steps, batch_size)
        self.rank_batch = micro_steps * batch_size
        self.global_batch = self.rank_batch * world
        self.per_epoch = len(data) // self.global_batch
        self._epoch, self._order = -1, np.empty(0, dtype=np.int64)
        if self.per_epoch == 0:
            raise UserError(
                f"config.data must hold at least one batch, {self.global_batch} sequences "
                f"({world} ranks x {micro_steps} micro steps x {batch_size}), got {len(data)}"
            )

    def batch(self, step: int) -> Tensor:
        """The token ids of inner step ``step``, counted from 0: ``[micro_steps, batch_size, length]`` int64."""
        start = self._start(step) + self.rank * self.rank_batch
        rows = self.data[self._order[start : start + self.rank_batch]]["input_ids"]
        return torch.from_numpy(np.asarray(rows, dtype=np.int64)).view(*self.shape, -1)

    def _start(self, step: int) -> int:
        """Draw the order of the step's epoch, if needed. Returns where in it the step's global batch begins."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(self.data))
        return position * self.global_batch

    def count_tokens(self, steps: Iterable[int]) -> int:
        """The number of tokens of all ranks, without padding, in the batches of ``steps``."""
        if "tokens" not in self.data.column_names:
            length = len(self.data[:1]["input_ids"][0])
            return sum(self.global_batch * length for _ in steps)
        counts = np.asarray(self.data["tokens"], dtype=np.int64)
        total = 0
        for step in steps:
            start = self._start(step)
            total += int(counts[self._order[start : start + self.global_batch]].sum())
        return total

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state
