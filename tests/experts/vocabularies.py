"""Models that know different tokens, for merges with ``tokenizer_source``; shared with the script that asks mergekit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ALPHABET = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrstuvwxyz0123456789.,:;!?-+*/=()[]{}<>"]
WORDS = ["ab", "cd", "ef", "gh", "abcd", "the"]
PLAIN = [*ALPHABET, *WORDS][:64]

MODELS: dict[str, tuple[list[str], list[str], int]] = {
    "base": (PLAIN, [], 64),
    "padded": (PLAIN, ["<pad0>", "<pad1>", "<pad2>", "<pad3>"], 64),
    "chatml": (PLAIN, ["<|im_start|>", "<|im_end|>"], 66),
    "wide": (PLAIN, [], 80),
    "chatml2": (PLAIN, ["<|im_end|>", "<tool>", "<|im_start|>"], 67),
}
"""Plain tokens, added tokens, rows. ``padded`` has tokens without rows, ``wide`` rows without tokens."""

RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"method": "linear", "base": "base", "models": ["base", "padded", "chatml"]},
    "linear_table": {"method": "linear", "base": "base", "models": ["base", "padded", "chatml"], "table": True},
    "linear_padded_first": {"method": "linear", "base": "padded", "models": ["padded", "chatml", "base"]},
    "linear_wide": {"method": "linear", "base": "wide", "models": ["wide", "chatml", "chatml2"]},
    "ties": {"method": "ties", "base": "base", "models": ["padded", "chatml", "chatml2"]},
    "ties_table": {"method": "ties", "base": "base", "models": ["padded", "chatml"], "table": True},
    "task_arithmetic": {"method": "task_arithmetic", "base": "base", "models": ["chatml", "chatml2"]},
    "base": {"method": "task_arithmetic", "base": "padded", "models": ["chatml"], "source": "base"},
}
"""All of them name a base: without one, mergekit takes whichever model its set of them happens to give first."""


def recipe(name: str, root: Path) -> dict[str, Any]:
    """mergekit's YAML as a table."""
    asked = RECIPES[name]
    parameters = {"weight": 0.5} | ({"density": 0.5} if asked["method"] == "ties" else {})
    found: dict[str, Any] = {
        "merge_method": asked["method"],
        "models": [{"model": str(root / model), "parameters": parameters} for model in asked["models"]],
        "dtype": "float32",
    }
    source = asked.get("source", "union")
    found |= {"tokenizer": {"source": source}} if asked.get("table") else {"tokenizer_source": source}
    return found | {"base_model": str(root / asked["base"])}


def make(root: Path, name: str) -> Path:
    """The model ``name`` in a directory of its own."""
    plain, added, rows = MODELS[name]
    ids = {token: index for index, token in enumerate(plain)}
    merges = [(word[:half], word[half:]) for word in plain if len(word) > 1 for half in [2 if len(word) == 4 else 1]]
    merges = [(a, b) for a, b in merges if a in ids and b in ids]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.add_tokens(added, special_tokens=name != "chatml2")
    assert len(fast) == len(plain) + len(added), len(fast)
    fast.save_pretrained(root / name)
    torch.manual_seed(list(MODELS).index(name))
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=rows, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / name)
    return root / name
