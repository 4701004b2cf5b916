"""Frankenmerges load: what a configuration says of each layer moves with the layer, and what cannot be loaded is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.merging import pairing, recipe_mergekit, sites, stacking
from distmerge.merging.models import open_all
from tests.files.models import write

SIZES: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 8, "vocab_size": 40, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 4},
    "qwen3": {},
    "gemma2": {"sliding_window": 4},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "smollm3": {"no_rope_layers": [1, 0, 1, 1]},
    "llama4_text": {"num_local_experts": 2, "intermediate_size_mlp": 24, "moe_layers": [1, 3], "attention_chunk_size": 8},
}
RANGES = ([0, 2], [1, 4])
TAKEN = [0, 1, 1, 2, 3]


def make(path: Path, kind: str, forget: tuple[str, ...] = (), **keys: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | KINDS.get(kind, {}) | keys))
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in forget}))
    return path


def stack(root: Path, model: Path, ranges: Any = RANGES) -> Path:
    slices = [{"sources": [{"model": str(model), "layer_range": list(span)}]} for span in ranges]
    (root / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": "passthrough", "slices": slices}))
    assert main.run(["merge", str(root / "recipe.yaml"), "--out", str(root / "out")]) == 0
    return root / "out"


@pytest.mark.parametrize("forget", [(), ("layer_types", "no_rope_layers")], ids=["written out", "left to transformers"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_frankenmerge_loads_and_each_layer_stays_what_it_was(kind, forget, tmp_path):
    donor = make(tmp_path / "donor", kind, forget)
    out = stack(tmp_path, donor)
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, report = loaded
    assert not any(report.values())
    before, after = AutoConfig.from_pretrained(donor), AutoConfig.from_pretrained(out)
    assert after.num_hidden_layers == len(model.model.layers) == 5
    for key in ("layer_types", "no_rope_layers"):
        values = getattr(before, key, None)
        if values:
            assert getattr(after, key) == [values[index] for index in TAKEN], key
    if kind == "llama4_text":
        assert after.moe_layers == [1, 2, 4]
    logits = model(torch.arange(20).view(2, 10)).logits
    assert bool(torch.isfinite(logits).all())


def test_lists_of_tokens_are_not_taken_for_lists_of_layers(tmp_path):
    out = stack(tmp_path, make(tmp_path / "donor", "qwen3", eos_token_id=[1, 2, 3, 4]))
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [1, 2, 3, 4]


def test_slices_that_make_no_model_are_refused_before_a_byte_is_written(tmp_path):
    donor = make(tmp_path / "donor", "qwen3")
    content = load_file(donor / "model.safetensors")
    gone = "model.layers.2.self_attn.q_norm.weight"
    save_file({name: value for name, value in content.items() if name != gone}, donor / "model.safetensors")
    with pytest.raises(UserError, match=r"it lacks model\.layers\.3\.self_attn\.q_norm\.weight"):
        stack(tmp_path, donor)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.merging").exists()


def test_experts_by_a_rule_over_the_index_are_refused_where_they_would_move(tmp_path):
    keys: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 24, "decoder_sparse_step": 2}
    donor = make(tmp_path / "donor", "qwen3_moe", **keys)
    with pytest.raises(UserError, match=r"the slices do not make a qwen3_moe model: it lacks model\.layers"):
        stack(tmp_path, donor)


def test_a_stack_of_many_layers_is_proved_by_its_first(tmp_path, monkeypatch):
    monkeypatch.setattr(stacking, "CHECKED_LAYERS", 3)
    out = stack(tmp_path, make(tmp_path / "donor", "llama4_text"))
    assert AutoConfig.from_pretrained(out).num_hidden_layers == 5
    content = load_file(tmp_path / "donor" / "model.safetensors")
    gone = "model.layers.2.self_attn.q_proj.weight"
    save_file({name: value for name, value in content.items() if name != gone}, tmp_path / "donor" / "model.safetensors")
    (tmp_path / "again").mkdir()
    with pytest.raises(UserError, match=r"it lacks model\.layers\.1\.self_attn"):
        stack(tmp_path / "again", tmp_path / "donor", ([0, 1], [2, 4]))


def test_three_thousand_slices_are_planned_from_one_look_at_each_model(tmp_path, monkeypatch):
    shapes = {"model.embed_tokens.weight": (8, 4), "model.norm.weight": (4,)}
    shapes |= {f"model.layers.{i}.{part}.weight": (4, 4) for i in range(32) for part in "abcdefgh"}
    donor = write(tmp_path / "donor", {name: torch.ones(shape) for name, shape in shapes.items()}, config={"num_layers": 32})
    slices = [{"sources": [{"model": str(donor), "layer_range": [i % 32, i % 32 + 1]}]} for i in range(3000)]
    recipe = recipe_mergekit.from_table({"merge_method": "passthrough", "slices": slices}, "")
    looks: list[str] = []
    real = sites.layer_stack
    monkeypatch.setattr(sites, "layer_stack", lambda model: (looks.append(model.reference), real(model))[1])
    assert len(pairing.pair(recipe, open_all(recipe, False))) == 24_002
    assert len(looks) <= 2
