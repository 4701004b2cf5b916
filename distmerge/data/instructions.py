"""Instruction data: prompts with completions, and chats. One example per row; only completions and replies count in the loss.

A row holds the example's token ids. Those of the prompt are stored as complements (see :mod:`distmerge.data.loss_mask`), and so
is the padding. Padding comes last, so that a causal model needs no attention mask for it.
"""

from __future__ import annotations

import functools
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from distmerge.config.data import Data
from distmerge.errors import UserError
from distmerge.model import load_tokenizer, token_ids

VERSION = 1
"""Part of the cache's key: raise it when the results of rows() change."""

Part = tuple[str, bool]
"""A piece of text, and whether it counts in the loss."""


def example_rows(documents: datasets.Dataset, section: Data) -> datasets.Dataset:
    """One row for each example: ``input_ids``, and ``tokens``, the number of them that are not padding.

    Raises:
        UserError: when a column is missing or has the wrong type, or an example is too long and ``overlong`` is "refuse".
    """
    for column in columns_of(section):
        if column not in documents.column_names:
            known = ", ".join(documents.column_names)
            raise UserError(f'config.data must name columns of the data for format "{section.format}", {known}, got "{column}"')
    length = section.sequence_length
    features = datasets.Features(
        {"input_ids": datasets.Sequence(datasets.Value("int32"), length=length), "tokens": datasets.Value("int32")}
    )
    made = documents.map(
        functools.partial(rows, section=section.model_dump(), version=VERSION),
        batched=True, remove_columns=documents.column_names, features=features,
    )  # fmt: skip
    return made.with_format("numpy")


def rows(batch: dict[str, list], section: dict[str, Any], version: int) -> dict[str, Any]:
    """The rows of a batch of documents, without examples that have nothing to learn."""
    data = Data.model_validate(section)
    tokenizer, length = cached_tokenizer(data.tokenizer), data.sequence_length
    found: dict[str, list] = {"input_ids": [], "tokens": []}
    for values in zip(*(batch[column] for column in columns_of(data)), strict=True):
        ids = encode(parts_of(values, data, tokenizer), tokenizer)
        if len(ids) > length:
            if data.overlong == "drop":
                continue
            raise UserError(
                f"config.data.sequence_length must be >= the tokens of each example, got {length} and an example of {len(ids)} "
                '(overlong = "drop" leaves such examples out)'
            )
        if (ids[1:] >= 0).any():
            padding = np.full(length - len(ids), ~special(tokenizer, "pad"), dtype=np.int32)
            found["input_ids"].append(np.concatenate([ids, padding]))
            found["tokens"].append(len(ids))
    return found


cached_tokenizer = functools.lru_cache(maxsize=2)(load_tokenizer)


def columns_of(section: Data) -> list[str]:
    """The columns that the format reads."""
    return [section.messages] if section.format == "chat" else [section.prompt, section.completion]


def parts_of(values: tuple[Any, ...], section: Data, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    """An example as pieces of text, from its values in the columns."""
    if section.format == "chat":
        return chat_parts(values[0], section.messages, tokenizer)
    prompt, completion = values
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError(f'config.data must hold text in every row of "{section.prompt}" and "{section.completion}"')
    return [(prompt, False), (completion, True)]


def chat_parts(messages: Any, column: str, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    """A chat in the tokenizer's template, or in a plain one if it has none. Only the assistant's replies count in the loss.

    The template is applied to growing beginnings of the chat; the text that a turn adds is that turn's part. For example, the
    parts of ``[user, assistant]`` are the template of ``[user]`` with the generation prompt, and what ``[user, assistant]``
    adds to it.
    """
    valid = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not valid or not messages:
        raise UserError(
            f'config.data.messages must hold tables of role and content in every row, got something else in "{column}"'
        )
    if not getattr(tokenizer, "chat_template", None):
        parts: list[Part] = []
        for turn in messages:
            parts += [(f"{turn['role']}: ", False), (turn["content"] + "\n", turn["role"] == "assistant")]
        return parts
    parts, text = [], ""
    for index, turn in enumerate(messages):
        if turn["role"] == "assistant":
            asked: Any = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
            parts.append((after(text, asked), False))
            text = asked
        said: Any = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        parts.append((after(text, said), turn["role"] == "assistant"))
        text = said
    return parts


def after(before: str, text: str) -> str:
    """What ``text`` adds to ``before``."""
    if not text.startswith(before):
        raise UserError("config.data.tokenizer must have a chat template in which later turns do not change earlier text")
    return text[len(before) :]


def encode(parts: list[Part], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """An example's token ids, int32, as complements where they do not count in the loss. An end-of-text token is added at the
    end, unless the last part has one."""
    found: list[np.ndarray] = []
    for text, learned in parts:
        if text:
            (ids,) = token_ids(tokenizer, [text])
            found.append(ids if learned else ~ids)
    end = special(tokenizer, "eos")
    if not found or len(found[-1]) == 0 or found[-1][-1] not in (end, ~end):
        found.append(np.asarray([end if parts and parts[-1][1] else ~end], dtype=np.int32))
    return np.concatenate(found)


def special(tokenizer: PreTrainedTokenizerBase, kind: str) -> int:
    """The id of the token of a kind, "eos" or "pad". Without a padding token the end-of-text token is used."""
    ids = [getattr(tokenizer, f"{name}_token_id") for name in (kind, "eos")]
    known = [value for value in ids if isinstance(value, int)]
    if not known:
        raise UserError("config.data.tokenizer must have an end-of-text token for examples, got none")
    return known[0]
