"""Instruction data: prompts with completions, and chats. One example a row, the loss on what is to be learned only.

A row is the example's token ids, those of the prompt as complements (see :mod:`distmerge.data.loss_mask`), filled up with
padding, which is a complement too and follows all that counts: a causal model needs no mask for it.
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
"""Part of the cache's key: raise it when rows() gives other results."""

Part = tuple[str, bool]
"""A piece of text, and whether it is to be learned."""


def example_rows(documents: datasets.Dataset, section: Data) -> datasets.Dataset:
    """One row an example: ``input_ids`` and ``tokens``, those that are no padding.

    Raises:
        UserError: when a column is missing or holds something else, or an example is too long and ``overlong`` is "refuse".
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
    data = Data.model_validate(section)
    tokenizer, length = cached_tokenizer(data.tokenizer), data.sequence_length
    found: dict[str, list] = {"input_ids": [], "tokens": []}
    for values in zip(*(batch[column] for column in columns_of(data)), strict=True):
        ids = encode(parts_of(values, data, tokenizer), tokenizer)
        if len(ids) > length:
            if data.overlong == "drop":
                continue
            raise UserError(
                f"config.data.sequence_length must be >= the tokens of each example, got {length} and one of {len(ids)} "
                '(overlong = "drop" leaves such examples out)'
            )
        if (ids[1:] >= 0).any():
            padding = np.full(length - len(ids), ~special(tokenizer, "pad"), dtype=np.int32)
            found["input_ids"].append(np.concatenate([ids, padding]))
            found["tokens"].append(len(ids))
    return found


cached_tokenizer = functools.lru_cache(maxsize=2)(load_tokenizer)


def columns_of(section: Data) -> list[str]:
    return [section.messages] if section.format == "chat" else [section.prompt, section.completion]


def parts_of(values: tuple[Any, ...], section: Data, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    if section.format == "chat":
        return chat_parts(values[0], section.messages, tokenizer)
    prompt, completion = values
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError(f'config.data must hold text in every row of "{section.prompt}" and "{section.completion}"')
    return [(prompt, False), (completion, True)]


def chat_parts(messages: Any, column: str, tokenizer: PreTrainedTokenizerBase) -> list[Part]:
    """A chat in the tokenizer's template, or in a plain one where it has none; what the assistant says is to be learned.

    The template is applied to the chat's beginnings: what a turn adds to the text before it is that turn.
    """
    sound = isinstance(messages, list) and all(
        isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
        for turn in messages
    )
    if not sound or not messages:
        raise UserError(f'config.data.messages must hold a list of role and content in every row, got another in "{column}"')
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
    if not text.startswith(before):
        raise UserError("config.data.tokenizer has a chat template in which a turn changes the text before it")
    return text[len(before) :]


def encode(parts: list[Part], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """int32 ids; complements where nothing is to be learned. An end of text closes the last part."""
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
    """The id of the end of text, or of padding, for which the end of text serves, too."""
    ids = [getattr(tokenizer, f"{name}_token_id") for name in (kind, "eos")]
    known = [value for value in ids if isinstance(value, int)]
    if not known:
        raise UserError("config.data.tokenizer must have an end-of-text token for examples, got none")
    return known[0]
