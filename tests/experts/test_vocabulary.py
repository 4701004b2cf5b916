"""tokenizer_source: rows follow their tokens into another order; what a model lacks comes from those that have it."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distmerge import cli
from distmerge.errors import UserError

VOCABULARIES = {"one": ["<unk>", "a", "b", "c"], "two": ["<unk>", "c", "b", "d", "a"]}


@pytest.fixture
def root(tmp_path):
    for seed, (name, words) in enumerate(VOCABULARIES.items()):
        path = tmp_path / name
        path.mkdir()
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(path)
        generator = torch.Generator().manual_seed(seed)
        embedding = torch.randn(len(words), 6, generator=generator)
        save_file({"model.embed_tokens.weight": embedding, "model.norm.weight": torch.ones(6)}, path / "model.safetensors")
        (path / "config.json").write_text(json.dumps({"vocab_size": len(words), "model_type": "llama"}))
    return tmp_path


def merge(root, source: str):
    entries = [{"model": str(root / name), "parameters": {"weight": 1}} for name in VOCABULARIES]
    recipe = {"merge_method": "linear", "models": entries, "tokenizer_source": source}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    out = root / "out"
    assert cli.run(["merge", str(root / "recipe.yaml"), "--out", str(out)]) == 0
    return load_file(out / "model.safetensors")["model.embed_tokens.weight"], AutoTokenizer.from_pretrained(out).get_vocab()


@pytest.mark.parametrize("source", ["base", "union", "two"])
def test_rows_follow_tokens(source, root):
    merged, vocabulary = merge(root, str(root / source) if source == "two" else source)
    one, two = (load_file(root / name / "model.safetensors")["model.embed_tokens.weight"] for name in VOCABULARIES)
    words = {"base": "abc", "union": "abcd", "two": "abcd"}[source]
    assert set(vocabulary) == {"<unk>", *words} and merged.shape == (len(words) + 1, 6)
    for word in words:
        second = two[VOCABULARIES["two"].index(word)]
        first = one[VOCABULARIES["one"].index(word)] if word in VOCABULARIES["one"] else second
        assert torch.allclose(merged[vocabulary[word]], (first + second) / 2)
    assert json.loads((root / "out" / "config.json").read_text())["vocab_size"] == len(words) + 1


def test_different_vocabularies_need_a_choice(root):
    flags = [part for name in VOCABULARIES for part in ("--model", str(root / name))]
    with pytest.raises(UserError, match="a tokenizer_source would align vocabularies"):
        cli.run(["merge", "--method", "linear", *flags, "--out", str(root / "out")])
