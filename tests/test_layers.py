from __future__ import annotations

import pytest

from distmerge.theta.layers import Place, blocks_of, in_block, is_token_embedding, numbered, place_of, role_of


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.mlp.up_proj.weight", Place("model.layers.", 3)),
        ("transformer.h.11.attn.c_attn.weight", Place("transformer.h.", 11)),
        ("h.0.ln_1.weight", Place("h.", 0)),
        ("blocks.0.weight", Place("blocks.", 0)),
        ("0.weight", Place("", 0)),
        ("layers.0.mlp.experts.7.up_proj.weight", Place("layers.", 0)),
        ("encoder.block.2.layer.1.DenseReluDense.wi.weight", Place("encoder.block.", 2)),
        ("vision_model.encoder.layers.5.mlp.fc1.weight", Place("vision_model.encoder.layers.", 5)),
        ("encoder.layers.encoder_layer_4.mlp.0.weight", Place("encoder.layers.encoder_layer_", 4)),
        ("layer1.0.conv1.weight", Place("layer1.", 0)),
        ("model.norm.weight", None),
        ("layer1.weight", None),
        ("mlp.fc_1.weight", None),
    ],
)
def test_the_first_number_in_a_name_is_the_block(name: str, place: Place | None) -> None:
    assert place_of(name) == place


def test_a_name_is_moved_to_another_block_by_its_first_number_alone() -> None:
    assert in_block("layers.0.mlp.experts.7.up.weight", 12) == "layers.12.mlp.experts.7.up.weight"
    assert in_block("layers.0.mlp.experts.7.up.weight", "*") == "layers.*.mlp.experts.7.up.weight"
    assert in_block("norm.weight", 3) == "norm.weight"


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("transformer.wpe.weight", "embedding"),
        ("embeddings.patch_embedding.weight", "embedding"),
        ("embeddings.LayerNorm.weight", "embedding"),
        ("lm_head.weight", "head"),
        ("embed_out.weight", "head"),
        ("output.weight", "head"),
        ("encoder.layer.0.attention.output.dense.weight", "other"),
        ("model.norm.weight", "norm"),
        ("layers.0.input_layernorm.weight", "norm"),
        ("h.0.ln_1.bias", "norm"),
        ("transformer.ln_f.weight", "norm"),
        ("bn1.weight", "norm"),
        ("layers.0.mlp.up_proj.weight", "other"),
    ],
)
def test_roles_are_told_by_names(name: str, role: str) -> None:
    assert role_of(name) == role


def test_positions_are_no_table_of_tokens() -> None:
    assert is_token_embedding("transformer.wte.weight") and not is_token_embedding("transformer.wpe.weight")


def test_experts_and_small_heads_are_no_blocks() -> None:
    names = [f"layers.{i}.experts.{e}.up.weight" for i in range(2) for e in range(9)] + ["head.0.weight", "head.2.weight"]
    assert set(blocks_of(names).values()) == {Place("layers.", 0), Place("layers.", 1)}


def test_a_model_of_plain_layers_has_them_as_blocks() -> None:
    assert numbered(["0.weight", "0.bias", "2.weight", "4.weight"]) == {
        "0.weight": 0,
        "0.bias": 0,
        "2.weight": 1,
        "4.weight": 2,
    }


def test_blocks_of_several_lists_are_counted_through_in_the_order_of_the_names() -> None:
    names = ["enc.layers.1.a.w", "enc.layers.0.a.w", "dec.layers.0.a.w", "dec.layers.10.a.w", "dec.layers.9.a.w", "norm.w"]
    assert list(numbered(names).values()) == [1, 0, 2, 4, 3]
