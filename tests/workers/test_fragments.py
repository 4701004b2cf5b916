"""Which parameters merge together: every list of blocks is dealt out, or names say what goes where."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distmerge as dm
from distmerge.config.mergers import DiLoCoSettings
from distmerge.config.toml import checked
from distmerge.errors import UserError
from distmerge.theta.flat import FlatParameters, Slot
from distmerge.theta.layers import Place, place_of
from distmerge.workers.fragments import assign, cut_fragments
from tests.ranks import Ranks
from tests.workers.test_streaming import Blocks, train


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)


class Seq2Seq(nn.Module):
    """An encoder and a decoder, a token embedding that is the head, too."""

    def __init__(self, encoder: int = 3, decoder: int = 3, width: int = 16) -> None:
        super().__init__()
        self.shared = nn.Embedding(7, width)
        self.encoder = nn.ModuleDict(
            {"block": nn.ModuleList(Block(width) for _ in range(encoder)), "norm": nn.LayerNorm(width)}
        )
        self.decoder = nn.ModuleDict(
            {"block": nn.ModuleList(Block(width) for _ in range(decoder)), "norm": nn.LayerNorm(width)}
        )
        self.lm_head = nn.Linear(width, 7, bias=False)
        self.lm_head.weight = self.shared.weight


def shares(groups: list[list[Slot]]) -> list[float]:
    sizes = [sum(math.prod(slot.shape) for slot in group) for group in groups]
    return [size / sum(sizes) for size in sizes]


@pytest.mark.parametrize("order", ["strided", "balanced"])
@pytest.mark.parametrize(("encoder", "decoder", "count"), [(3, 3, 3), (3, 3, 2), (3, 5, 4), (1, 5, 3)])
def test_fragments_of_an_encoder_and_a_decoder_are_balanced(order: str, encoder: int, decoder: int, count: int) -> None:
    layout = FlatParameters(Seq2Seq(encoder, decoder)).layout
    groups = assign(layout, count, order)
    assert sorted(slot.name for group in groups for slot in group) == sorted(slot.name for slot in layout)
    assert max(shares(groups)) - min(shares(groups)) < 0.1


def test_tied_weights_lie_in_one_fragment_once() -> None:
    groups = assign(FlatParameters(Seq2Seq()).layout, 3, "strided")
    assert [slot.name for group in groups for slot in group].count("shared.weight") == 1
    assert "shared.weight" in [slot.name for slot in groups[0]]


def test_an_odd_number_of_blocks_is_dealt_out_in_turn() -> None:
    names = [f"layers.{i}.mlp.w" for i in range(5)]
    layout = tuple(Slot(name, (4,), 4 * i) for i, name in enumerate(["embed.w", *names, "norm.w"]))
    groups = [[slot.name for slot in group] for group in assign(layout, 2, "strided")]
    assert groups == [["embed.w", names[0], names[2], names[4]], [names[1], names[3], "norm.w"]]


def test_an_expert_goes_with_its_layer() -> None:
    names = [f"layers.{i}.mlp.experts.{e}.up.weight" for i in range(4) for e in range(8)]
    layout = tuple(Slot(name, (2,), 2 * i) for i, name in enumerate(names))
    groups = assign(layout, 4, "strided")
    assert [{place_of(slot.name) for slot in group} for group in groups] == [{Place("layers.", i)} for i in range(4)]
    with pytest.raises(UserError, match="fragments must be <= the model's 4 blocks, got 5"):
        assign(layout, 5, "strided")


def test_patterns_say_what_goes_where() -> None:
    flat = FlatParameters(Seq2Seq())
    patterns = (r"^encoder\.", r"^decoder\.", r"^shared\.")
    first, second, third = cut_fragments(flat, 3, "strided", 10**6, patterns)
    covered = torch.zeros(flat.vector.numel(), dtype=torch.int64)
    for bucket in [*first, *second, *third]:
        for part in bucket.slices:
            covered[part] += 1
    assert covered.eq(1).all()
    assert [bucket.numel for bucket in third] == [7 * 16]
    assert sum(bucket.numel for bucket in first) == sum(p.numel() for p in flat.model.get_submodule("encoder").parameters())


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        (("encoder", "decoder"), r"parameter shared.weight must match exactly one of fragment_patterns, it matches none"),
        (("encoder|shared", "coder"), r"parameter encoder.block.0.norm.weight must match .*'encoder\|shared' and 'coder'"),
        (("coder|shared", "adapter"), r"fragment_patterns: 'adapter' matches no parameter"),
        (("(", "x"), r"fragment_patterns must be regular expressions, got '\('"),
    ],
)
def test_patterns_that_do_not_divide_the_model_are_refused(patterns: tuple[str, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        cut_fragments(FlatParameters(Seq2Seq()), 2, "strided", 10**6, patterns)


def test_there_are_as_many_patterns_as_fragments() -> None:
    with pytest.raises(UserError, match="fragment_patterns must be as many as fragments = 3, got 2"):
        checked(DiLoCoSettings, every=10, fragments=3, fragment_patterns=("a", "b"))


def merged(settings: dict[str, Any]) -> Tensor:
    torch.manual_seed(7)
    model = Blocks()
    merger = dm.DiLoCo(model, every=4, fragments=2, **settings)
    train(model, [merger], 9)
    merger.finish()
    return merger.flat.vector.clone()


def test_patterns_that_name_the_strided_fragments_train_the_same_bits(ranks: Ranks) -> None:
    named = {"fragment_patterns": (r"embed|layers\.[02]\.", r"layers\.[13]\.|head")}
    for ours, theirs in zip(ranks.run(2, merged, named), ranks.run(2, merged, {}), strict=True):
        assert ours.equal(theirs)
