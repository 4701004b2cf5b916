"""What the names of a model's parameters say: which block of which list each belongs to, and what is an embedding or a head.

This is all that is known of an architecture. A name is a path of modules, and the first number in it is the place in a list:

    model.layers.3.mlp.experts.7.up_proj.weight    block 3 of ``model.layers.``: an expert is part of its block
    transformer.h.3.attn.c_attn.weight             block 3 of ``transformer.h.``
    encoder.block.0.layer.1.mlp.wi.weight          block 0 of ``encoder.block.``; the decoder is a list of its own
    encoder.layers.encoder_layer_2.ln_1.weight     block 2 of ``encoder.layers.encoder_layer_`` (torchvision's ViT)

Imports no torch, since files are read by it too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

NUMBER = re.compile(r"(?:^|\.|(?:layer|block)_)(\d+)\.")

Role = Literal["embedding", "head", "norm", "other"]
"""embedding: what turns tokens, positions or patches into vectors, with the norm that some models put into it; it stands
before the blocks. head: the output layer over the vocabulary. norm: a normalisation's gain or bias."""

HEAD = re.compile(r"lm_head|embed_out|^output\.")
EMBEDDING = re.compile(r"embed|wte|wpe")
NORM = re.compile(r"norm|(?:^|\.)(?:ln|bn)(?:_?\w)?\.[^.]+$", re.IGNORECASE)
TOKENS = re.compile(r"(?:embed_tokens|wte|word_embeddings|embed_in)\.[^.]+$")


@dataclass(frozen=True)
class Place:
    """Where a parameter lies.

    Attributes:
        list: the path of the list of blocks, up to the number: ``model.layers.``.
        index: the block's number in it, from 0.
    """

    list: str
    index: int


def place_of(name: str) -> Place | None:
    """The block that a parameter belongs to; None for one that is in no list, such as a final norm."""
    match = NUMBER.search(name)
    return Place(name[: match.start(1)], int(match[1])) if match else None


def in_block(name: str, index: int | str) -> str:
    """The name of the same parameter in another block of its list; with ``*``, the name that all blocks share."""
    match = NUMBER.search(name)
    return name if match is None else f"{name[: match.start(1)]}{index}{name[match.end(1) :]}"


def role_of(name: str) -> Role:
    """The role of a parameter, as far as its name tells."""
    if HEAD.search(name):
        return "head"
    if EMBEDDING.search(name):
        return "embedding"
    return "norm" if NORM.search(name) else "other"


def has_rows_of_their_own(name: str) -> bool:
    """Whether a parameter's rows each belong to a token or a position: those of embeddings and of heads."""
    return role_of(name) in ("embedding", "head")


def is_token_embedding(name: str) -> bool:
    """Whether a parameter is the table of the tokens' embeddings, which some models use as their head too."""
    return TOKENS.search(name) is not None


def blocks_of(names: Iterable[str]) -> dict[str, Place]:
    """The parameters that belong to blocks, in the given order, with the place of each.

    Every list of blocks counts: an encoder's and a decoder's, or each stage of a vision model. A list of plain layers, such as
    the ``nn.Sequential`` of a small head, is a list of blocks only where the model has no list of modules that hold others.
    """
    places = {name: place for name in names if (place := place_of(name)) is not None}
    nested = {place.list for name, place in places.items() if "." in within(name)}
    return {name: place for name, place in places.items() if place.list in nested or not nested}


def within(name: str) -> str:
    """The name of a parameter inside its block: ``mlp.up_proj.weight``."""
    match = NUMBER.search(name)
    return name if match is None else name[match.end() :]


def numbered(names: Iterable[str]) -> dict[str, int]:
    """The number of each parameter's block when all blocks of a model are counted through.

    Lists follow each other in the order of the names, blocks of a list by their index; missing indices are passed over.
    """
    blocks = blocks_of(names)
    lists = {place.list: rank for rank, place in reversed(list(enumerate(blocks.values())))}
    order = sorted(set(blocks.values()), key=lambda place: (lists[place.list], place.index))
    numbers = {place: number for number, place in enumerate(order)}
    return {name: numbers[place] for name, place in blocks.items()}
