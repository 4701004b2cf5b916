"""Prompts with completions and chats: what the loss is taken of, to the token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import ByT5Tokenizer

from distmerge.config.train import Data, Model
from distmerge.data.instructions import chat_parts, encode
from distmerge.data.loss_mask import ids_and_labels, micro_weights, predicted
from distmerge.data.packed import IndexedBatches, open_corpus
from distmerge.errors import UserError
from distmerge.evaluate import evaluate
from distmerge.model import build_model, load_tokenizer
from tests.checkpoints.runs import BASE, run

BASE_MODEL = Model.model_validate(BASE["model"])


def write_examples(folder: Path, count: int = 40) -> str:
    rows = [{"prompt": f"{i} + {i} = ", "completion": f"{2 * i}" + "!" * (i % 3)} for i in range(count)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "sums.jsonl")


def section(folder: Path, **keys) -> Data:
    given = {"source": "files", "files": [write_examples(folder)], "format": "completion", "sequence_length": 24}
    return Data.model_validate(given | {"eval_fraction": 0.2} | keys)


def test_the_completion_alone_counts(tmp_path: Path) -> None:
    corpus = open_corpus(section(tmp_path))
    assert len(corpus.train) == 32 and len(corpus.held_out) == 8
    tokenizer = ByT5Tokenizer()
    for row, tokens in zip(corpus.train["input_ids"], corpus.train["tokens"], strict=True):
        batch = torch.from_numpy(np.asarray(row, dtype=np.int64))
        ids, labels = ids_and_labels(batch)
        text = str(tokenizer.decode(ids[:tokens], skip_special_tokens=True))
        prompt, completion = text.split(" = ")
        learned = tokenizer.decode(labels[labels >= 0])
        assert learned == completion + "</s>" and prompt.count("+") == 1
        assert all(token == tokenizer.pad_token_id for token in ids[tokens:].tolist()) and (labels[tokens:] < 0).all()


def test_chats_are_learned_where_the_assistant_speaks() -> None:
    tokenizer = load_tokenizer("bytes")
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "see you")]
    chat = [{"role": role, "content": content} for role, content in turns]
    plain = chat_parts(chat, "messages", tokenizer)
    assert "".join(text for text, _ in plain) == "user: hi\nassistant: hello\nuser: bye\nassistant: see you\n"
    assert [text for text, learned in plain if learned] == ["hello\n", "see you\n"]
    said, asked = "<{{ m.role }}>{{ m.content }}</>", "{% if add_generation_prompt %}<assistant>{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{said}{{% endfor %}}{asked}"
    parts = chat_parts(chat, "messages", tokenizer)
    assert "".join(text for text, _ in parts) == "<user>hi</><assistant>hello</><user>bye</><assistant>see you</>"
    assert [text for text, learned in parts if learned] == ["hello</>", "see you</>"]
    ids = encode(parts, tokenizer)
    assert ids[-1] == tokenizer.eos_token_id and (ids < 0).sum() == len("<user>hi</><assistant><user>bye</><assistant>")


def test_the_loss_is_that_of_the_completions_one_by_one(tmp_path: Path) -> None:
    data = section(tmp_path)
    model = build_model(BASE_MODEL, load_tokenizer("bytes"), 0).eval()
    corpus = open_corpus(data)
    sums, count = 0.0, 0
    for row in corpus.held_out["input_ids"]:
        ids, labels = ids_and_labels(torch.from_numpy(np.asarray(row, dtype=np.int64)))
        logits = model(input_ids=ids[None]).logits[0, :-1]
        sums += cross_entropy(logits.detach(), labels[1:], reduction="sum", ignore_index=-100).item()
        count += int((labels[1:] >= 0).sum())
    found = evaluate(model, corpus.held_out, 3)
    assert found.tokens == count
    assert found.loss == pytest.approx(sums / count, rel=1e-6)


def test_micro_steps_weigh_by_their_tokens() -> None:
    batch = torch.randint(0, 9, (3, 2, 10))
    batch[0, :, :8], batch[1, 0] = ~batch[0, :, :8], ~batch[1, 0]
    weights, tokens = micro_weights(batch, None)
    counts = torch.stack([predicted(micro) for micro in batch]).float()
    assert counts.tolist() == [4, 9, 18]
    assert tokens.item() == 31
    losses = torch.rand(3)
    torch.testing.assert_close((losses * weights).mean(), (losses * counts).sum() / counts.sum())


def test_tokens_are_counted_without_padding(tmp_path: Path) -> None:
    corpus = open_corpus(section(tmp_path))
    ranks = [IndexedBatches(corpus.train, 5, rank, 2, 1, 4) for rank in range(2)]
    seen = sum(int((ids_and_labels(own.batch(step))[0] != 0).sum()) for own in ranks for step in range(9))
    assert ranks[0].count_tokens(range(9)) == seen


def test_examples_that_are_too_long_are_refused_or_dropped(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sequence_length must be >= the tokens of each example, got 12"):
        open_corpus(section(tmp_path, sequence_length=12))
    assert 0 < len(open_corpus(section(tmp_path, sequence_length=12, overlong="drop")).train) < 32
    with pytest.raises(UserError, match='must name columns of the data for format "completion"'):
        open_corpus(section(tmp_path, completion="answer"))


def test_replay_makes_up_its_share(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text("\n".join(json.dumps({"prompt": "q", "completion": "z"}) for _ in range(10)))
    mixed = open_corpus(section(tmp_path, replay={"share": 0.25, "files": [str(tmp_path / "other.jsonl")]})).train
    assert len(mixed) == 32 + 11
    assert sum(int(row[0] == ~(ord("q") + 3)) for row in mixed["input_ids"]) == 11


def test_a_run_learns_completions(tmp_path: Path) -> None:
    write_examples(tmp_path)
    keys = {"format": "completion", "sequence_length": 24, "files": [str(tmp_path / "sums.jsonl")]}
    made = run(
        tmp_path, "run", tmp_path / "sums.jsonl", data=keys, steps=30, train={"batch_size": 2, "gradient_accumulation": 2}
    )
    summary = json.loads((made / "summary.json").read_text())
    assert summary["eval_loss_last"] < summary["eval_loss_first"] - 1
    assert json.loads((made / "final" / "training.json").read_text())["tokens"] < 30 * 4 * 24
