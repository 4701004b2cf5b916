"""tokenizer_source: rows follow their tokens into another order; what a model lacks comes from those that have it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from distmerge.cli import main
from distmerge.errors import UserError
from tests.experts import vocabularies

FIXTURES = Path(__file__).parents[1] / "fixtures" / "mergekit"
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
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
    assert main.run(["merge", str(root / "recipe.yaml"), "--out", str(out)]) == 0
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
    with pytest.raises(UserError, match="set tokenizer_source to align the vocabularies"):
        main.run(["merge", "--method", "linear", *flags, "--out", str(root / "out")])


@pytest.fixture(scope="module")
def union(tmp_path_factory):
    """Models that know different tokens, with the embeddings that mergekit merged."""
    path = tmp_path_factory.mktemp("union")
    golden = load_file(FIXTURES / "union.safetensors")
    for name in vocabularies.MODELS:
        file = vocabularies.make(path, name) / "model.safetensors"
        content = load_file(file)
        save_file(content | {key: golden[f"{name}/{key}"] for key in EMBEDDINGS}, file)
    return path


@pytest.mark.parametrize("name", vocabularies.RECIPES)
def test_a_union_of_tokenizers_equals_mergekits(name, union, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(vocabularies.recipe(name, union)))
    assert main.run(["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 0
    golden, merged = load_file(FIXTURES / "union.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    tokens = json.loads((FIXTURES / "union.json").read_text())[name]
    vocabulary = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert set(vocabulary) == set(tokens)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == len(tokens)
    for key in EMBEDDINGS:
        assert merged[key].shape[0] == len(tokens)
        assert bool(merged[key].abs().sum(1).all()), "no row is zero"
        for row, token in enumerate(tokens):
            assert torch.allclose(merged[key][vocabulary[token]], golden[f"={name}/{key}"][row], atol=1e-7), token


def test_a_tokenizer_that_is_a_link_to_a_file_of_the_reader_is_refused_by_name(root, tmp_path):
    secret = tmp_path / "secret.txt"
    secret.write_text("what nobody is to see")
    (root / "one" / "chat_template.jinja").symlink_to(secret)
    flags = [part for name in ("one", "one") for part in ("--model", str(root / name))]
    for more in ([], ["--tokenizer", "union"]):
        with pytest.raises(UserError, match=r"chat_template\.jinja is a link out of the model's directory"):
            main.run(["merge", "--method", "linear", *flags, *more, "--out", str(tmp_path / "out")])
        assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(root, tmp_path):
    home = tmp_path / "hub" / "models--org--name"
    (home / "snapshots").mkdir(parents=True)
    (home / "blobs").mkdir()
    (root / "one").rename(home / "snapshots" / "abc")
    for file in list((home / "snapshots" / "abc").iterdir()):
        file.rename(home / "blobs" / file.name)
        file.symlink_to(home / "blobs" / file.name)
    model = str(home / "snapshots" / "abc")
    assert main.run(["merge", "--method", "passthrough", "--model", model, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (home / "blobs" / "tokenizer.json").read_bytes()
