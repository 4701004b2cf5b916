"""Where text comes from: a section of the configuration. Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distmerge.config.section import Section
from distmerge.errors import UserError


class Replay(Section):
    share: float = Field(gt=0, lt=1)
    """Of the training sequences, those that are drawn from the files below."""
    files: list[str] = Field(min_length=1)
    """Globs, read as data.files are."""


class Data(Section):
    source: Literal["stdlib", "files", "hub"] = "stdlib"
    """stdlib: the source text of Python's standard library on this machine; files: the files below; hub: a data set of
    the Hugging Face hub or its cache."""
    files: list[str] = Field(default=[])
    """Globs of .txt, .jsonl or .parquet files (source files). One text file is cut into pieces at line ends."""
    dataset: str | None = None
    """The data set's name (source hub)."""
    name: str | None = None
    """The data set's configuration (source hub)."""
    split: str = "train"
    """The data set's split (source hub)."""
    column: str = "text"
    """The column that holds the text, in .jsonl and .parquet files and hub data sets."""
    streaming: bool = False
    """Read as a stream, without an index: for corpora that do not fit the disk."""
    shuffle_buffer: int = Field(default=1000, ge=1)
    """Documents that a stream shuffles at a time, from several shards in turn (streaming). 1 does not shuffle them."""
    tokenizer: str = "bytes"
    """bytes, or a tokenizer's directory or hub id."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens per sequence; documents are packed end to end."""
    eval_fraction: float = Field(default=0.02, gt=0, lt=1)
    """Share of the documents held out for evaluation; at least one."""
    format: Literal["text", "completion", "chat"] = "text"
    """text: packed end to end. completion, chat: one example a row, padded, with the loss on the completion, or on what
    the assistant says, only."""
    prompt: str = "prompt"
    """The column of the prompt (format completion)."""
    completion: str = "completion"
    """The column of the completion (format completion)."""
    messages: str = "messages"
    """The column of the messages, a list of role and content (format chat)."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What becomes of examples of more than sequence_length tokens."""
    replay: Replay | None = None
    """Text that is mixed in."""

    @model_validator(mode="after")
    def complete(self) -> Data:
        if self.streaming and (self.format != "text" or self.replay is not None):
            raise UserError("streaming must be false with replay, or where format is not text, got true")
        if (self.source == "files") != bool(self.files):
            raise UserError(f'files must be given exactly when data.source is "files", got {self.files}')
        if (self.source == "hub") != (self.dataset is not None):
            raise UserError(f'dataset must be given exactly when data.source is "hub", got {self.dataset}')
        return self
