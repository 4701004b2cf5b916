"""The judge of merges in memory: what it says of a merge is what the merged model has, and nothing of it stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from distmerge.config.train import Model
from distmerge.errors import UserError
from distmerge.evaluate import evaluate
from distmerge.experts.adapt import Theta
from distmerge.judge import Judge, holding, texts_of
from distmerge.model import build_model, load_tokenizer
from distmerge.theta.flat import FlatParameters, fingerprint

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip


def model(seed: int) -> nn.Module:
    return build_model(Model(config=LLAMA), load_tokenizer("bytes"), seed)


def bits(subject: nn.Module) -> dict[str, int]:
    return {name: int(fingerprint(value)) for name, value in subject.state_dict().items()}


@pytest.fixture
def judge(tmp_path: Path) -> Judge:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name} tells {name} of it. " * 200)
    return Judge(model(0), texts_of({name: [str(tmp_path / f"{name}.txt")] for name in ("a", "b")}, "bytes", 32, 8))


def test_a_merge_is_judged_as_the_merged_model_would_be_and_leaves_no_bit(judge: Judge) -> None:
    other, before = model(1), bits(judge.model)
    state = {name: torch.lerp(value, other.state_dict()[name], 0.5) for name, value in judge.model.state_dict().items()}
    found = judge.losses_of(holding(judge.model, state))
    assert bits(judge.model) == before
    other.load_state_dict(state)
    assert found == {name: evaluate(other, text, 8).loss for name, text in judge.texts.items()}
    assert found != judge.losses()


def test_a_vector_is_judged_as_the_same_tensors_by_their_names(judge: Judge) -> None:
    other, before = model(1), bits(judge.model)
    theta = Theta(judge.model, FlatParameters(judge.model))
    vector = theta.of(other.state_dict())
    by_name = judge.losses_of(holding(judge.model, other.state_dict()))
    assert judge.losses_of(theta.holding(vector), ["b"]) == {"b": by_name["b"]}
    assert bits(judge.model) == before


def test_what_fails_while_it_is_judged_leaves_no_bit_either(judge: Judge) -> None:
    before = bits(judge.model)
    with pytest.raises(KeyError):
        judge.losses_of(holding(judge.model, model(1).state_dict()), ["no such text"])
    assert bits(judge.model) == before


def test_a_text_too_short_for_a_sequence_is_refused_by_its_option(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("ab")
    with pytest.raises(UserError, match="--skill code must hold at least one sequence of 32 tokens"):
        texts_of({"code": [str(tmp_path / "short.txt")]}, "bytes", 32, 8)
