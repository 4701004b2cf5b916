"""Evaluation: the mean loss per token, however it is dealt."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import torch.distributed as dist
from transformers import ByT5Tokenizer

from distmerge.cli import main
from distmerge.config import toml
from distmerge.config.train import Model
from distmerge.data.loss_mask import ids_and_labels
from distmerge.evaluate import Evaluation, evaluate
from distmerge.model import build_model, save_model
from tests.byte_pairs import byte_pairs
from tests.checkpoints import runs
from tests.ranks import Ranks

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def model() -> Any:
    return build_model(Model(config={"model_type": "llama", "attention_dropout": 0.5, **SMALL}), ByT5Tokenizer(), 0)


def sequences(count: int) -> datasets.Dataset:
    rows = torch.randint(3, 250, (count, 12), generator=torch.Generator().manual_seed(1))
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()}).with_format("numpy")


def reference(count: int) -> float:
    rows = torch.tensor(sequences(count)[:]["input_ids"])
    logits = model().eval()(rows).logits[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits.double(), rows[:, 1:].flatten()).item()


def one_by_one(rows: list[list[int]]) -> list[tuple[float, int]]:
    """The summed loss and the predicted tokens of each sequence, by the model alone."""
    found = []
    for row in rows:
        ids, labels = ids_and_labels(torch.tensor(row))
        logits = model().eval()(ids[None]).logits[0, :-1].double()
        losses = torch.nn.functional.cross_entropy(logits, labels[1:], reduction="sum", ignore_index=-100)
        found.append((losses.item(), int((labels[1:] >= 0).sum())))
    return found


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11, 100])
def test_every_sequence_is_judged_once_whatever_the_batch_size(batch_size: int) -> None:
    result = evaluate(model(), sequences(11), batch_size)
    assert result.tokens == 11 * 11
    assert result.loss == pytest.approx(reference(11), rel=1e-6)


def masked(count: int) -> datasets.Dataset:
    """Rows of which less and less counts, as examples are stored."""
    rows = torch.tensor(sequences(count)[:]["input_ids"])
    for index in range(count):
        rows[index, : index % 9] = ~rows[index, : index % 9]
    return datasets.Dataset.from_dict({"input_ids": rows.tolist()}).with_format("numpy")


@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_sequences_weigh_by_their_tokens_and_the_error_is_that_of_a_ratio(batch_size: int) -> None:
    """Against the jackknife, which knows no formula: the spread of the losses that leave one sequence out."""
    parts = one_by_one(masked(40)[:]["input_ids"].tolist())
    total, tokens = (sum(column) for column in zip(*parts, strict=True))
    result = evaluate(model(), masked(40), batch_size)
    assert result.tokens == tokens and result.loss == pytest.approx(total / tokens, rel=1e-6)
    without = [(total - loss) / (tokens - count) for loss, count in parts]
    mean = sum(without) / 40
    jackknife = math.sqrt(39 / 40 * sum((loss - mean) ** 2 for loss in without))
    assert result.standard_error == pytest.approx(jackknife, rel=0.05)


def test_one_sequence_has_no_standard_error() -> None:
    assert evaluate(model(), sequences(1), 4).standard_error is None


def test_the_model_and_the_generators_are_left_as_they_were() -> None:
    subject = model().train()
    state = torch.get_rng_state()
    evaluate(subject, sequences(8), 4)
    assert subject.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in subject.parameters())


def dealt(batch_size: int) -> Evaluation:
    return evaluate(model(), masked(11), batch_size, dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize(("world", "batch_size"), [(2, 2), (3, 2), (3, 1), (2, 100)])
def test_dealt_to_ranks_it_is_the_same(ranks: Ranks, world: int, batch_size: int) -> None:
    """Also where ranks have no batch of their own: nothing is judged twice."""
    alone = evaluate(model(), masked(11), 4)
    for result in ranks.run(world, dealt, batch_size):
        assert result.tokens == alone.tokens
        assert result.loss == pytest.approx(alone.loss, rel=1e-6)
        assert result.standard_error == pytest.approx(alone.standard_error, rel=1e-4)


def test_the_verb_prints_one_object(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_model(model(), ByT5Tokenizer(), tmp_path / "model")
    (tmp_path / "a.txt").write_text("some words to judge " * 50)
    arguments = ["eval", str(tmp_path / "model"), "--files", str(tmp_path / "a.txt"), "--sequence-length", "20"]
    assert main.run(arguments) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == 50 * 19
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))
    assert result["bits_per_byte"] == pytest.approx(result["loss"] / math.log(2))
    assert result["bytes"] == result["tokens"] and result["sequences"] == 50 and result["loss_se"] < 0.1
    assert main.run([*arguments, "--sequences", "16"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["tokens"] == 16 * 19
    with pytest.raises(main.UserError, match="--batches is now --sequences"):
        main.run([*arguments, "--batches", "2"])


LOUD = """
import os, subprocess, sys
print("a library says hello")
os.system("echo so does its child")
import logging
logging.getLogger("loud").addHandler(logging.StreamHandler(sys.stdout))
"""


def test_a_library_that_prints_is_not_in_the_result(tmp_path: Path) -> None:
    save_model(model(), ByT5Tokenizer(), tmp_path / "model")
    (tmp_path / "a.txt").write_text("some words to judge " * 50)
    (tmp_path / "loud.py").write_text(LOUD)
    (tmp_path / "run.py").write_text(
        "import sys\nimport distmerge.evaluate\nfrom distmerge.cli import main as cli\n"
        "read = distmerge.evaluate.evaluate_directory\n"
        "def loud(*arguments):\n    import loud, logging\n    result = read(*arguments)\n"
        "    logging.getLogger('loud').warning('and its logger')\n    return result\n"
        "distmerge.evaluate.evaluate_directory = loud\ncli.main()\n"
    )
    given = ["eval", str(tmp_path / "model"), "--files", str(tmp_path / "a.txt"), "--sequence-length", "20"]
    job = subprocess.run([sys.executable, str(tmp_path / "run.py"), *given], capture_output=True, text=True, timeout=1200)
    assert job.returncode == 0, job.stderr
    assert json.loads(job.stdout)["tokens"] == 50 * 19
    assert "hello" in job.stderr and "its child" in job.stderr and "its logger" in job.stderr


def test_the_verbs_mistakes(tmp_path: Path) -> None:
    save_model(model(), ByT5Tokenizer(), tmp_path / "model")
    (tmp_path / "a.txt").write_text("few")
    with pytest.raises(main.UserError, match="--files must hold at least one sequence of 20 tokens"):
        main.run(["eval", str(tmp_path / "model"), "--files", str(tmp_path / "a.txt"), "--sequence-length", "20"])
    with pytest.raises(main.UserError, match="sequence_length must be <= 2048, the model's number of positions, got 3000"):
        (tmp_path / "b.txt").write_text("many " * 1000)
        main.run(["eval", str(tmp_path / "model"), "--files", str(tmp_path / "b.txt"), "--sequence-length", "3000"])
    with pytest.raises(main.UserError, match="matches no file"):
        main.run(["eval", str(tmp_path / "model"), "--files", str(tmp_path / "no*.txt")])


# ---- the text that a model is judged on


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return runs.write_text(tmp_path)


@pytest.mark.parametrize("streaming", [False, True])
def test_without_files_a_model_is_judged_on_what_its_own_run_held_out(
    tmp_path: Path, text: Path, capsys: pytest.CaptureFixture, streaming: bool
) -> None:
    """It was the standard library's, whatever the model was trained on. The loss is that of the run's own last evaluation."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in text.read_text().splitlines()))
    data = {"streaming": True, "files": [str(tmp_path / "a.jsonl")]} if streaming else {}
    made = runs.run(tmp_path, "run", text, steps=4, data=data, evaluate={"sequences": 40})
    summary = json.loads((made / "summary.json").read_text())
    assert 0 < summary["eval_loss_last_se"] < 0.1
    lines = [json.loads(line) for line in (made / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/loss_se"] for line in lines if "eval/loss" in line][-1] == summary["eval_loss_last_se"]
    for record in (True, False):
        if not record:
            (made / "final" / "training.json").unlink()  # config.toml of the run directory tells, too
        assert main.run(["eval", str(made / "final"), "--sequences", "40"]) == 0
        found = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert found["sequences"] == 40 and found["tokens"] == 40 * 31
        assert found["loss"] == pytest.approx(summary["eval_loss_last"], rel=1e-6)
        assert found["loss_se"] == pytest.approx(summary["eval_loss_last_se"], rel=1e-5)


def test_where_nothing_tells_what_was_held_out_files_are_asked_for(tmp_path: Path) -> None:
    save_model(model(), ByT5Tokenizer(), tmp_path / "model")
    with pytest.raises(main.UserError, match=r"--files must be given for .*model, since no training.json or config.toml says"):
        main.run(["eval", str(tmp_path / "model")])
    record = {"data": {"source": "files", "files": [str(tmp_path / "gone.txt")]}}
    (tmp_path / "model" / "training.json").write_text(json.dumps(record))
    with pytest.raises(main.UserError, match=r"cannot read the text that .* was trained on, give --files GLOB: .*gone.txt"):
        main.run(["eval", str(tmp_path / "model")])
    for broken in ("{", "[]", '{"data": {"source": "moon"}}', '{"data": 5}'):
        (tmp_path / "model" / "training.json").write_text(broken)
        with pytest.raises(main.UserError, match=r"training.json does not describe the data of .*: give --files GLOB"):
            main.run(["eval", str(tmp_path / "model")])


def test_bits_per_byte_of_a_bpe_model_count_the_bytes_of_its_text(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """They were printed for byte tokenizers alone. A model that knows nothing needs log2(vocabulary) bits for each token."""
    tokenizer = byte_pairs(["the words of the text that it learns"])
    subject = build_model(Model(config={"model_type": "llama", **SMALL}), tokenizer, 0)
    with torch.no_grad():
        subject.get_output_embeddings().weight.zero_()  # pyright: ignore
    save_model(subject, tokenizer, tmp_path / "model")
    text = "the words of the text, é–\N{GRINNING FACE}, are its "
    (tmp_path / "a.txt").write_text(text * 40)
    assert main.run(["eval", str(tmp_path / "model"), "--files", str(tmp_path / "a.txt"), "--sequence-length", "16"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    ids: Any = tokenizer(text * 40)["input_ids"]
    rows = [ids[start : start + 16] for start in range(0, len(ids) - 15, 16)]
    size = sum(len(str(tokenizer.decode(row[1:])).encode()) for row in rows)
    assert found["bytes"] == pytest.approx(size, abs=2 * len(rows))  # a decoded row may begin or end within a character
    assert found["bytes"] > 1.5 * found["tokens"]
    bits = math.log2(len(tokenizer)) * found["tokens"] / found["bytes"]
    assert found["bits_per_byte"] == pytest.approx(bits, rel=1e-5)


# ---- what a run is told


def test_a_configuration_with_batches_is_told_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(
        main.UserError, match=r"^config.evaluate.batches is now sequences, .* write sequences = 32 x train.batch"
    ):
        toml.validate({"run_dir": "x", "model": {"path": "y"}, "evaluate": {"batches": 32}})


def test_a_run_of_the_earlier_version_is_named_with_what_to_change(tmp_path: Path, text: Path) -> None:
    made = runs.run(tmp_path, "run", text, steps=2)
    stored = (made / "config.toml").read_text()
    (made / "config.toml").write_text(stored.replace("sequences = 16", "batches = 4"))
    with pytest.raises(
        main.UserError, match=r"run/config.toml was written by an earlier version: config.evaluate.batches is now sequences"
    ):
        runs.run(tmp_path, "run", text, steps=3)
