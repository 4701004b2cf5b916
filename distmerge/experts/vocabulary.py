"""One vocabulary for models that have several: the rows of embeddings put in the order of the output's tokenizer.

Where a model lacks a token, its row is the base's, if the base has it; else the mean over the models that have it; 0 if none
has. This is mergekit's rule for ``tokenizer_source``.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.experts.recipe import Recipe
from distmerge.files.models import Model
from distmerge.files.sources import Source


class Alignment:
    """The output's tokenizer, and where each of its tokens lies in each model.

    Attributes:
        size: tokens of the output.
        rows: model -> ``[size]`` int64, the token's row there, -1 for none.
        files: the tokenizer's files.
    """

    def __init__(self, recipe: Recipe, models: dict[str, Model]):
        assert recipe.tokenizer is not None
        tokenizers = {reference: load(model) for reference, model in models.items()}
        source = recipe.tokenizer.source
        if source not in ("base", "union") and source not in models:
            raise UserError(f"tokenizer_source must be base, union or a model of the recipe, got {source}")
        chosen = tokenizers[source if source in models else recipe.donor]
        if source == "union":
            extend(chosen, [other for other in tokenizers.values() if other is not chosen])
        vocabulary = chosen.get_vocab()
        self.size = max(vocabulary.values()) + 1
        self.base = recipe.donor
        self.rows = {name: places(vocabulary, self.size, tokenizers[name], models[name]) for name in models}
        self.files = files_of(chosen)

    def align(self, models: list[str], sources: list[Source]) -> list[Source]:
        """The sources of one embedding, each in the output's order of rows."""
        return [Aligned(self, models, sources, index) for index in range(len(sources))]


class Aligned:
    """One model's embedding in the output's order; rows that it lacks come from the others."""

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
        total = torch.zeros(self._width)
        for index in having:
            total += self._read(index, at[index])
        return (total / len(having)).to(self.dtype)

    def _read(self, index: int, row: int) -> Tensor:
        return self._sources[index].read(row * self._width, (row + 1) * self._width)


def load(model: Model) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(model.directory))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no tokenizer"])[0]
        raise UserError(f"tokenizer_source needs a tokenizer in {model.reference}: {reason}") from None


def extend(tokenizer: Any, others: list[Any]) -> None:
    """Add what the other tokenizers know beyond this one: plain tokens first, then added ones with their settings."""
    for plain in (True, False):
        for other in others:
            added = {str(token.content): token for token in other.added_tokens_decoder.values()}
            known = tokenizer.get_vocab()
            names = [name for name, _ in sorted(other.get_vocab().items(), key=lambda item: item[1]) if name not in known]
            new = [name if plain else added[name] for name in names if (name not in added) == plain]
            tokenizer.add_tokens(new)


def places(vocabulary: dict[str, int], size: int, tokenizer: Any, model: Model) -> Tensor:
    """``[size]``: the row of each output token in the model, -1 for none."""
    own, rows = tokenizer.get_vocab(), int(model.config.get("vocab_size", 0))
    found = torch.full((size,), -1, dtype=torch.int64)
    for token, index in vocabulary.items():
        if own.get(token, rows) < rows:
            found[index] = own[token]
    return found


def files_of(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {path.name: path.read_bytes() for path in Path(scratch).iterdir() if path.is_file()}
