"""Models: built the same everywhere, saved so that transformers loads them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from distmerge.config.train import Model
from distmerge.errors import UserError
from distmerge.model import build_model, check_fits, first_line, load_model, load_tokenizer, save_model
from distmerge.theta.flat import FlatParameters

SMALL = {
    "llama": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32},
    "qwen3": {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}


def build(model_type: str, seed: int = 0, **keys: Any) -> Any:
    section = Model(config={"model_type": model_type, **SMALL[model_type], **keys})
    return build_model(section, ByT5Tokenizer(), seed)


def test_the_seed_gives_the_weights() -> None:
    first, again, other = (dict(build("llama", seed).named_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_vocabulary_is_the_tokenizers() -> None:
    model = build("llama")
    assert model.config.vocab_size == len(ByT5Tokenizer())
    assert model.config.eos_token_id == ByT5Tokenizer().eos_token_id
    assert build("llama", vocab_size=1000).config.vocab_size == 1000
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", SMALL)
def test_a_flat_model_is_saved_so_that_it_loads(tmp_path: Path, model_type: str, tied: bool) -> None:
    model = build(model_type, tie_word_embeddings=tied)
    flat = FlatParameters(model)
    flat.vector.add_(0.25)
    save_model(model, ByT5Tokenizer(), tmp_path)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    head, table = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert (head is table) == tied
    assert sum(p.numel() for p in loaded.parameters()) == flat.vector.numel()
    theirs = dict(loaded.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(theirs[name], parameter)
    names = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in names.values()) == flat.vector.numel(), "tied weights are stored once"
    batch = torch.arange(20).view(2, 10)
    assert torch.equal(loaded(batch).logits, model.eval()(batch).logits)
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == len(ByT5Tokenizer())


def test_training_goes_on_from_a_directory(tmp_path: Path) -> None:
    model = build("llama")
    save_model(model, ByT5Tokenizer(), tmp_path)
    loaded = build_model(Model(path=str(tmp_path)), load_tokenizer(str(tmp_path)), seed=9)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, 'config.model.config.model_type must be one that transformers knows, got "lama"'),
        ({"model_type": "llama", "n_layer": 2}, "config.model.config.n_layer is not a known key of llama"),
        (
            {"model_type": "llama", "num_hidden_layer": 2},
            'num_hidden_layer is not a known key of llama; did you mean "num_hidden_layers"?',
        ),
        ({"model_type": "llama", "vocab_size": 3}, "config.model.config.vocab_size must be >= 384, the tokenizer's, got 3"),
        (
            {"model_type": "llama", "hidden_size": 7},
            "is not valid for llama: ValueError: The hidden size (7) is not a multiple",
        ),
        (
            {"model_type": "t5"},
            "config.model.config does not describe a causal language model: Unrecognized configuration class",
        ),
    ],
)
def test_mistakes(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_model(Model(config=config), ByT5Tokenizer(), 0)
    assert message in str(caught.value)


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"cannot load a causal language model from .*model_type"):
        load_model(str(tmp_path))
    with pytest.raises(
        UserError, match=r"config.model.path must be a directory or a hub id, got /no/where, which does not exist"
    ):
        load_model("/no/where")
    with pytest.raises(UserError, match=r'config.data.tokenizer must be "bytes", a directory or a hub id, got '):
        load_tokenizer(str(tmp_path))


def test_weights_are_read_from_safetensors_only(tmp_path: Path) -> None:
    model = build("llama")
    save_model(model, ByT5Tokenizer(), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load a causal language model"):
        load_model(str(tmp_path))


def test_what_does_not_fit() -> None:
    tokenizer = ByT5Tokenizer()
    model = build("gpt2")
    check_fits(model, tokenizer, 32)
    with pytest.raises(UserError, match=r"config.data.sequence_length must be <= 32, the model's number of positions, got 33"):
        check_fits(model, tokenizer, 33)
    model.resize_token_embeddings(20)
    with pytest.raises(
        UserError, match=r"config.data.tokenizer must have at most 20 tokens, the size of the model's embedding, got 384"
    ):
        check_fits(model, tokenizer, 32)


def test_first_lines() -> None:
    assert first_line(ValueError("\n  a reason\nand more")) == "a reason"
    assert first_line(ValueError("Validation failed:\n  a reason")) == "a reason"
    assert first_line(ValueError()) == "ValueError"
    assert first_line(KeyError("gelo")) == "unknown key 'gelo'"


def with_code(path: Path, model_type: str) -> None:
    """A directory whose configuration names code that would leave a trace if it were run."""
    save_model(build("llama"), ByT5Tokenizer(), path)
    (path / "trap.py").write_text(
        f"open({str(path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, ByT5Tokenizer\n"
        "class C(LlamaConfig):\n    model_type = 'trap'\nclass M(LlamaForCausalLM):\n    config_class = C\n"
        "class T(ByT5Tokenizer):\n    pass\n"
    )
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": model_type, "auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"}}
    (path / "config.json").write_text(json.dumps(config))


def test_code_of_a_model_is_neither_asked_about_nor_run(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with_code(tmp_path / "known", "llama")
    assert len(list(load_model(str(tmp_path / "known")).parameters())) > 0, "what transformers knows itself loads without it"
    with_code(tmp_path / "unknown", "trap")
    for load in (load_model, load_tokenizer):
        if load is load_tokenizer:
            table = json.loads((tmp_path / "unknown" / "tokenizer_config.json").read_text())
            table |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["trap.T", None]}}
            (tmp_path / "unknown" / "tokenizer_config.json").write_text(json.dumps(table))
        with pytest.raises(UserError, match=r"needs Python code of its own \(auto_map in its configuration\)"):
            load(str(tmp_path / "unknown"))
    assert not list(tmp_path.rglob("ran"))


def test_a_model_that_lacks_weights_is_refused_by_the_name_of_one(tmp_path: Path) -> None:
    save_model(build("llama", tie_word_embeddings=False), ByT5Tokenizer(), tmp_path)
    content = load_file(tmp_path / "model.safetensors")
    gone = "model.layers.1.mlp.up_proj.weight"
    save_file({name: value for name, value in content.items() if name != gone}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"lacks {gone}$"):
        load_model(str(tmp_path))
    save_file(content | {gone: torch.zeros(3, 3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"has another shape than its config.json says of {gone}$"):
        load_model(str(tmp_path))


def test_weights_without_a_place_are_said(tmp_path: Path, capfd) -> None:
    save_model(build("llama"), ByT5Tokenizer(), tmp_path)
    content = load_file(tmp_path / "model.safetensors")
    save_file(content | {"score.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    load_model(str(tmp_path))
    assert "holds 1 weights that its architecture does not have, such as score.weight" in capfd.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_a_value_that_is_not_finite_is_refused_by_the_tensors_name(value: float, tmp_path: Path) -> None:
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = value
    save_model(model, ByT5Tokenizer(), tmp_path)
    with pytest.raises(UserError, match=r"holds NaN or infinity in model\.layers\.1\.mlp\.up_proj\.weight$"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"\1\2\3", b"\xff" * 64, 100, -1])
def test_broken_safetensors_are_one_line(content: bytes | int, tmp_path: Path) -> None:
    save_model(build("llama"), ByT5Tokenizer(), tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:content] if isinstance(content, int) else content)
    with pytest.raises(UserError, match="cannot load a causal language model") as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer_config.json"])
def test_a_pipe_in_a_model_is_refused_and_not_waited_for(name: str, tmp_path: Path) -> None:
    save_model(build("llama"), ByT5Tokenizer(), tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=f"{name} must be a regular file"):
            load(str(tmp_path))


@pytest.mark.parametrize("key", ["tokenizer", "model"])
def test_a_misspelt_path_is_answered_at_once(tmp_path: Path, key: str) -> None:
    """Where the hub cannot be reached, too, it was looked for there twelve times."""
    table = {"run_dir": str(tmp_path / "run"), "model": {"path": "models/absent"}}
    if key == "tokenizer":
        table |= {"model": {"config": {"model_type": "llama"}}, "data": {"tokenizer": "models/absent"}}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(table))
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    environment |= {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_CACHE": str(tmp_path)}
    job = subprocess.run(
        [sys.executable, "-m", "distmerge", "train", str(tmp_path / "config.toml")],
        env=environment, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert job.returncode == 2 and job.stderr.count("\n") == 1, job.stderr
    name = "config.data.tokenizer" if key == "tokenizer" else "config.model.path"
    expected = (
        f"error: {name} must be a directory or a hub id, got models/absent, which does not exist here, and the hub cannot"
    )
    assert job.stderr.startswith(expected)
