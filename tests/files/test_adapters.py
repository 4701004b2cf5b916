"""Adapters as PEFT merges them: equal to its merge_and_unload, or refused by the name of what is not supported."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.files.adapters import UNDERSTOOD, WITHOUT_EFFECT

peft = pytest.importorskip("peft")

SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 56, "max_position_embeddings": 64,
}  # fmt: skip
BASES: dict[str, dict[str, Any]] = {
    "llama": SIZES | {"intermediate_size": 48, "num_key_value_heads": 2, "attention_bias": True, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 56, "n_positions": 64, "tie_word_embeddings": False},
    "gpt_oss": SIZES
    | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
EXPERTS = {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}

EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", ATTENTION),
    "rslora": ("llama", ATTENTION | {"use_rslora": True}),
    "all linear layers": ("llama", {"target_modules": "all-linear"}),
    "one layer": ("llama", ATTENTION | {"layers_to_transform": [1], "layers_pattern": "layers"}),
    "gaussian": ("llama", ATTENTION | {"init_lora_weights": "gaussian"}),
    "orthogonal": ("llama", ATTENTION | {"init_lora_weights": "orthogonal"}),
    "mica": ("llama", ATTENTION | {"init_lora_weights": "mica"}),
    "pissa": ("llama", ATTENTION | {"init_lora_weights": "pissa", "lora_alpha": 6}),
    "pissa of each rank": ("llama", ATTENTION | {"init_lora_weights": "pissa", "rank_pattern": {"v_proj": 2}}),
    "olora": ("llama", ATTENTION | {"init_lora_weights": "olora", "lora_alpha": 6}),
    "dora": ("llama", ATTENTION | {"use_dora": True}),
    "dora on pissa": ("llama", ATTENTION | {"use_dora": True, "init_lora_weights": "pissa"}),
    "rank and alpha patterns": (
        "llama",
        ATTENTION | {"rank_pattern": {"q_proj": 3, r"layers\.1\.self_attn\.v_proj": 6}, "alpha_pattern": {"v_proj": 5}},
    ),
    "patterns and rslora": ("llama", ATTENTION | {"use_rslora": True, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}}),
    "lora_bias": ("llama", ATTENTION | {"lora_bias": True}),
    "bias of all": ("llama", ATTENTION | {"bias": "all"}),
    "bias of the adapted": ("llama", ATTENTION | {"bias": "lora_only"}),
    "lm_head": ("llama", {"target_modules": ["lm_head", "q_proj"]}),
    "embeddings": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embeddings with patterns": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "rank_pattern": {"embed_tokens": 2}}),
    "modules_to_save": ("llama", ATTENTION | {"modules_to_save": ["lm_head", "norm"]}),
    "embedding saved whole": ("llama", ATTENTION | {"modules_to_save": ["embed_tokens"]}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "experts": ("gpt_oss", EXPERTS),
    "experts and a layer": ("gpt_oss", EXPERTS | {"target_modules": ["q_proj"], "rank_pattern": {"experts.down_proj": 2}}),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "pissa by a random SVD": ("llama", ATTENTION | {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "dora on embeddings": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}, "use_dora"),
    "dora on Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}, "use_dora"),
    "pissa on Conv1D": (
        "gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "init_lora_weights": "pissa"}, "init_lora_weights"
    ),
    "aLoRA": ("llama", ATTENTION | {"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    "single tokens": ("llama", ATTENTION | {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "layer replication": ("llama", ATTENTION | {"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    found = {}
    for index, (kind, keys) in enumerate(BASES.items()):
        torch.manual_seed(index)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **keys), dtype=torch.float32)
        for value in model.parameters():
            torch.nn.init.normal_(value, std=0.2)
        found[kind] = tmp_path_factory.mktemp("bases") / kind
        model.save_pretrained(found[kind])
    return found


def load(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def make(base: Path, out: Path, keys: dict[str, Any]) -> None:
    """An adapter as PEFT saves it, all that it trains moved from where it began."""
    torch.manual_seed(7)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | keys)
    model = peft.get_peft_model(load(base), config)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn_like(value)
    model.save_pretrained(out)


def merged_by_peft(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    return peft.PeftModel.from_pretrained(load(base), str(adapter)).merge_and_unload().state_dict()


def merge(base: Path, adapter: Path, out: Path) -> dict[str, torch.Tensor]:
    assert main.run(["merge", "--method", "passthrough", "--model", f"{base}+{adapter}", "--out", str(out)]) == 0
    return load_file(out / "model.safetensors")


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_merged_as_peft_merges_it(name, bases, tmp_path):
    kind, keys = EQUAL[name]
    make(bases[kind], tmp_path / "adapter", keys)
    theirs, before = merged_by_peft(bases[kind], tmp_path / "adapter"), load_file(bases[kind] / "model.safetensors")
    ours = merge(bases[kind], tmp_path / "adapter", tmp_path / "out")
    changed = 0
    for key, value in ours.items():
        expected = theirs[key].double()
        assert float((value.double() - expected).norm() / expected.norm()) <= 1e-6, key
        changed += not torch.equal(value, before[key])
    assert changed


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_supported_is_refused_by_name(name, bases, tmp_path):
    kind, keys, key = REFUSED[name]
    make(bases[kind], tmp_path / "adapter", keys)
    with pytest.raises(UserError, match=f"{key}\\b"):
        merge(bases[kind], tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_every_key_of_peft_is_understood_or_refused_by_name(bases, tmp_path):
    make(bases["llama"], tmp_path / "adapter", ATTENTION)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    keys = [field.name for field in dataclasses.fields(peft.LoraConfig)]
    others = [key for key in keys if key not in (*UNDERSTOOD, *WITHOUT_EFFECT)]
    assert {"alora_invocation_tokens", "use_bdlora", "kasa_config", "ensure_weight_tying", "layer_replication"} <= set(others)
    for key in [*others, "a_key_of_tomorrow"]:
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {key: {"on": 1}}))
        with pytest.raises(UserError, match=f"{key} is not supported"):
            merge(bases["llama"], tmp_path / "adapter", tmp_path / "out")


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga", "pissa_niter_16", "a_way_of_tomorrow"])
def test_an_initialisation_that_changes_the_base_unsaid_is_refused(init, bases, tmp_path):
    make(bases["llama"], tmp_path / "adapter", ATTENTION)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    with pytest.raises(UserError, match=f"init_lora_weights must be one of .*, got {init}"):
        merge(bases["llama"], tmp_path / "adapter", tmp_path / "out")


def test_a_tensor_that_is_not_understood_is_refused_by_name(bases, tmp_path):
    make(bases["llama"], tmp_path / "adapter", ATTENTION)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    content = load_file(path)
    name = next(iter(content)).replace("lora_A.weight", "lora_diag").replace("lora_B.weight", "lora_diag")
    save_file(content | {name: torch.ones(4)}, path)
    with pytest.raises(UserError, match="lora_diag is not supported"):
        merge(bases["llama"], tmp_path / "adapter", tmp_path / "out")


def test_an_adapter_on_one_of_tied_embeddings_is_refused(tmp_path):
    config = AutoConfig.for_model("llama", **BASES["llama"] | {"tie_word_embeddings": True})
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "base")
    for target in ("embed_tokens", "lm_head"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            make(tmp_path / "base", tmp_path / target, {"target_modules": [target]})
        with pytest.raises(UserError, match="embeddings are tied"):
            merge(tmp_path / "base", tmp_path / target, tmp_path / "out")


@pytest.mark.parametrize("name", ["dora", "pissa", "embeddings", "lora_bias", "modules_to_save"])
@pytest.mark.filterwarnings("ignore")
def test_methods_of_adapters_refuse_what_is_more_than_factors(name, bases, tmp_path):
    kind, keys = EQUAL[name]
    make(bases[kind], tmp_path / "adapter", keys)
    flags = ["--model", str(tmp_path / "adapter"), "--model", str(tmp_path / "adapter"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"more to .* than add B A"):
        main.run(["merge", "--method", "cat", *flags])
