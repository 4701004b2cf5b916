"""Aligns models with different vocabularies: the rows of their embeddings are put in the order of the output's tokenizer.

Where a model lacks a token, its row is the base's, if the base has the token; else the mean over the models that have it; 0 if
none has. This is mergekit's rule for ``tokenizer_source``.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.files.models import TOKENIZER_FILES, Model, check_inside
from distmerge.files.sources import Source
from distmerge.merging.recipe import Recipe


class Alignment:
    """The output's tokenizer, and the row of each of its tokens in each model.

    Attributes:
        size: the number of rows of the output's embeddings.
        rows: for each model, ``[size]`` int64: the token's row in the model, -1 for none.
        files: the contents of the tokenizer's files, by name.

    Raises:
        UserError: when the recipe's tokenizer is not one of its models, or a model's tokenizer cannot be loaded or changed.
    """

    def __init__(self, recipe: Recipe, models: dict[str, Model]):
        assert recipe.tokenizer is not None
        tokenizers = {reference: load(model) for reference, model in models.items()}
        source = recipe.tokenizer.source
        if source not in ("base", "union") and source not in models:
            raise UserError(f"tokenizer_source must be base, union or a model of the recipe, got {source}")
        origin = source if source in models else recipe.donor
        chosen, self.base = tokenizers[origin], recipe.donor
        # Before the chosen tokenizer is changed, since a model's tokenizer tells which tokens the model has rows for.
        own = {name: own_tokens(tokenizers[name], models[name]) for name in models}
        strip(chosen, models[origin], own[origin])
        if source == "union":
            order = dict.fromkeys([recipe.donor, *models])
            extend(chosen, [tokenizers[name] for name in order], [own[name] for name in order])
        vocabulary = chosen.get_vocab()
        self.size = max(vocabulary.values()) + 1
        self.rows = {name: places(vocabulary, self.size, own[name]) for name in models}
        self.files = files_of(chosen)

    def align(self, models: list[str], sources: list[Source]) -> list[Source]:
        """The sources of one embedding, each with its rows in the order of the output's tokens."""
        return [Aligned(self, models, sources, index) for index in range(len(sources))]


class Aligned:
    """One model's embedding, with its rows in the output's order. Rows that it lacks come from the other models."""

    def __init__(self, alignment: Alignment, models: list[str], sources: list[Source], own: int):
        source = sources[own]
        self.shape, self.dtype = (alignment.size, *source.shape[1:]), source.dtype
        self.stored = tuple(entry for other in sources for entry in other.stored)
        self._width = max(1, int(torch.Size(source.shape[1:]).numel()))
        self._sources, self._own = sources, own
        self._rows = [alignment.rows[model] for model in models]
        self._base = models.index(alignment.base) if alignment.base in models else None

    def read(self, start: int, stop: int) -> Tensor:
        first, last = start // self._width, -(-stop // self._width)
        found = torch.stack([self._row(token) for token in range(first, last)])
        return found.view(-1)[start - first * self._width : stop - first * self._width]

    def _row(self, token: int) -> Tensor:
        at = [int(rows[token]) for rows in self._rows]
        if at[self._own] >= 0:
            return self._read(self._own, at[self._own])
        if self._base is not None and at[self._base] >= 0:
            return self._read(self._base, at[self._base]).to(self.dtype)
        having = [index for index, row in enumerate(at) if row >= 0]
        if not having:
            return torch.zeros(self._width, dtype=self.dtype)
        total = torch.zeros(self._width, dtype=self.dtype)  # mergekit sums in the tensors' own dtype
        for index in having:
            total += self._read(index, at[index]).to(self.dtype)
        return total / len(having)

    def _read(self, index: int, row: int) -> Tensor:
        return self._sources[index].read(row * self._width, (row + 1) * self._width)


def load(model: Model) -> Any:
    """Load the tokenizer beside a model's weights, without running any code from its directory."""
    from distmerge.model import load_tokenizer

    for name in TOKENIZER_FILES:
        if (model.directory / name).exists():
            check_inside(model.directory, model.directory / name)
    try:
        return load_tokenizer(str(model.directory))
    except UserError as error:
        raise UserError(f"tokenizer_source needs a tokenizer in {model.reference}: {error}") from None


def own_tokens(tokenizer: Any, model: Model) -> dict[str, int]:
    """The tokens that the model has a row for, with its index; a tokenizer may have more than config.json's vocab_size."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    rows = int(model.config.get("vocab_size", 0))
    return {token: index for token, index in vocabulary.items() if index < rows}


def strip(tokenizer: Any, model: Model, own: dict[str, int]) -> None:
    """Remove the tokens that the model has no row for from the tokenizer: the output would not have rows for them either.

    Raises:
        UserError: when they cannot be removed from this kind of tokenizer.
    """
    beyond = tokenizer.get_vocab().keys() - own.keys()
    if not beyond:
        return
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    table: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str()) if getattr(tokenizer, "is_fast", False) else {}
    model_part: dict[str, Any] = table.get("model", {})
    if model_part.get("type") != "BPE" and not (table and beyond <= added):
        raise UserError(
            f"the tokenizer of {model.reference} has tokens that the model has no row for, such as {min(beyond)!r}, and they "
            "can only be removed from a BPE tokenizer"
        )
    table["added_tokens"] = [token for token in table["added_tokens"] if token["content"] not in beyond]
    if model_part.get("type") == "BPE":
        model_part["vocab"] = {token: index for token, index in model_part["vocab"].items() if token not in beyond}
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model_part["merges"]]
        model_part["merges"] = [pair for pair in merges if not {*pair, "".join(pair)} & beyond]
    from tokenizers import Tokenizer

    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(table))
    for role, token in tokenizer.special_tokens_map.items():
        if token in beyond:  # loading the tokenizer would add it again
            setattr(tokenizer, role, None)


def extend(tokenizer: Any, others: list[Any], owned: list[dict[str, int]]) -> None:
    """Add other tokenizers' tokens that this one lacks, if their models have rows for them.

    Plain tokens come first, then added ones, with the settings of the first tokenizer that has them; this is mergekit's order.

    Args:
        owned: for each of the other tokenizers, the tokens that its model has rows for.
    """
    added: dict[str, Any] = {}
    for other, own in zip(others, owned, strict=True):
        for index, token in other.added_tokens_decoder.items():
            if own.get(str(token.content)) == index:
                added.setdefault(str(token.content), token)
    known = set(tokenizer.get_vocab())
    for own in owned:
        new = [token for token, _ in sorted(own.items(), key=lambda item: item[1]) if token not in known and token not in added]
        tokenizer.add_tokens(new)
        known.update(new)
    tokenizer.add_tokens([token for content, token in added.items() if content not in known])


def places(vocabulary: dict[str, int], size: int, own: dict[str, int]) -> Tensor:
    """``[size]`` int64: for each row of the output, the row of the same token in the model; -1 for none."""
    found = torch.full((size,), -1, dtype=torch.int64)
    for token, index in vocabulary.items():
        found[index] = own.get(token, -1)
    return found


def files_of(tokenizer: Any) -> dict[str, bytes]:
    """The contents of the files that transformers saves a tokenizer in, by name."""
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
