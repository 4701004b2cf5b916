"""The section of the training data. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distmerge.config.section import Section
from distmerge.errors import UserError


class Replay(Section):
    share: float = Field(gt=0, lt=1)
    """Share of the training sequences that is drawn from the replay files."""
    files: list[str] = Field(min_length=1)
    """Globs of the replay files, in the formats of data.files."""


class Data(Section):
    source: Literal["stdlib", "files", "hub"] = "stdlib"
    """stdlib: the source code of Python's standard library on this machine; files: the files of data.files; hub: a dataset
    from the Hugging Face hub or its local cache."""
    files: list[str] = Field(default=[])
    """Globs of .txt, .jsonl or .parquet files (source files). Long documents are split at line ends, so one file is enough."""
    dataset: str | None = None
    """Name of the dataset (source hub)."""
    name: str | None = None
    """Configuration of the dataset (source hub)."""
    split: str = "train"
    """Split of the dataset (source hub)."""
    column: str = "text"
    """Column with the text, in .jsonl and .parquet files and hub datasets."""
    streaming: bool = False
    """Read the data as a stream instead of indexing it, for corpora that do not fit on the disk."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """Number of documents in the shuffle buffer of a stream (streaming), read from several shards in turn. 1 disables
    shuffling."""
    tokenizer: str = "bytes"
    """bytes, or the directory or hub id of a tokenizer."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens per sequence. Documents are packed end to end."""
    eval_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents held out for evaluation, at least one document."""
    format: Literal["text", "completion", "chat"] = "text"
    """text: documents packed end to end. completion, chat: one padded example per row, with the loss only on the completion or
    on the assistant's messages."""
    prompt: str = "prompt"
    """Column with the prompt (format completion)."""
    completion: str = "completion"
    """Column with the completion (format completion)."""
    messages: str = "messages"
    """Column with the messages, a list of role and content (format chat)."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """Whether to stop with an error at examples with more than sequence_length tokens, or to drop them."""
    replay: Replay | None = None
    """Text that is mixed into the training data, such as text of the original pretraining."""

    @model_validator(mode="after")
    def complete(self) -> Data:
        if self.streaming and (self.format != "text" or self.replay is not None):
            raise UserError("streaming must be false with replay, or if format is not text, got true")
        if (self.source == "files") != bool(self.files):
            raise UserError(f'files must be given exactly when data.source is "files", got {self.files}')
        if (self.source == "hub") != (self.dataset is not None):
            raise UserError(f'dataset must be given exactly when data.source is "hub", got {self.dataset}')
        return self
