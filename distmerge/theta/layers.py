"""Infers a model's structure from its parameters' names: the block that each belongs to, and which are embeddings or heads.

Nothing else is known about architectures. A name is a path of modules, and the first number in it is the index of a block:

    model.layers.3.mlp.experts.7.up_proj.weight    block 3 of ``model.layers.``: an expert is part of its block
    transformer.h.3.attn.c_attn.weight             block 3 of ``transformer.h.``
    encoder.block.0.layer.1.mlp.wi.weight          block 0 of ``encoder.block.``; the decoder's blocks are another list
    encoder.layers.encoder_layer_2.ln_1.weight     block 2 of ``encoder.layers.encoder_layer_`` (torchvision's ViT)

This module imports no torch, since tools that only read files use it, too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

NUMBER = re.compile(r"(?:^|\.|(?:layer|block)_)(\d+)\.")

Role = Literal["embedding", "head", "norm", "other"]
"""embedding: turns tokens, positions or patches into vectors, including its norm in models that have one; it comes before the
blocks. head: the output layer over the vocabulary. norm: the gain or bias of a normalisation layer."""

HEAD = re.compile(r"lm_head|embed_out|^output\.")
EMBEDDING = re.compile(r"embed|wte|wpe")
NORM = re.compile(r"norm|(?:^|\.)(?:ln|bn)(?:_?\w)?\.[^.]+$", re.IGNORECASE)
TOKENS = re.compile(r"(?:embed_tokens|wte|word_embeddings|embed_in)\.[^.]+$")


@dataclass(frozen=True)
class Place:
    """The block that a parameter belongs to.

    Attributes:
        list: path of the list of blocks, up to the number, such as ``model.layers.``.
        index: the block's index in the list, from 0.
    """

    list: str
    index: int


def place_of(name: str) -> Place | None:
    """The block that a parameter belongs to; None for a parameter outside of all blocks, such as a final norm."""
    match = NUMBER.search(name)
    return Place(name[: match.start(1)], int(match[1])) if match else None


def in_block(name: str, index: int | str) -> str:
    """The name of the corresponding parameter in block ``index``. With ``*`` it stands for the parameter in all blocks."""
    match = NUMBER.search(name)
    return name if match is None else f"{name[: match.start(1)]}{index}{name[match.end(1) :]}"


def role_of(name: str) -> Role:
    """The role of a parameter, judged by its name."""
    if HEAD.search(name):
        return "head"
    if EMBEDDING.search(name):
        return "embedding"
    return "norm" if NORM.search(name) else "other"


def has_rows_of_their_own(name: str) -> bool:
    """Whether each row of a parameter belongs to one token or position, as in embeddings and heads."""
    return role_of(name) in ("embedding", "head")


def is_token_embedding(name: str) -> bool:
    """Whether a parameter is the token embedding, which some models also use as their head."""
    return TOKENS.search(name) is not None


def blocks_of(names: Iterable[str]) -> dict[str, Place]:
    """The parameters that belong to blocks, in the given order, with the place of each.

    A model may have several lists of blocks: an encoder's and a decoder's, or one for each stage of a vision model. A list of
    plain layers, such as the ``nn.Sequential`` of a small head, counts only if no list has modules with submodules.
    """
    places = {name: place for name in names if (place := place_of(name)) is not None}
    nested = {place.list for name, place in places.items() if "." in within(name)}
    return {name: place for name, place in places.items() if place.list in nested or not nested}


def within(name: str) -> str:
    """The name of a parameter relative to its block, such as ``mlp.up_proj.weight``."""
    match = NUMBER.search(name)
    return name if match is None else name[match.end() :]


def numbered(names: Iterable[str]) -> dict[str, int]:
    """The number of each parameter's block when all blocks of the model are numbered consecutively from 0.

    Lists are numbered in the order in which they first appear in ``names``, the blocks of a list by their index. Indices
    without a block are skipped: blocks 0 and 2 of a list get the numbers 0 and 1.
    """
    blocks = blocks_of(names)
    lists = {place.list: rank for rank, place in reversed(list(enumerate(blocks.values())))}
    order = sorted(set(blocks.values()), key=lambda place: (lists[place.list], place.index))
    numbers = {place: number for number, place in enumerate(order)}
    return {name: numbers[place] for name, place in blocks.items()}
