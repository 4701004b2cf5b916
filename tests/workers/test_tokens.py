"""The tokens that counted in a worker's loss reach its merger: in ``distmerge train``, and in the Trainer of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import distmerge as dm
from distmerge.config.train import Data
from distmerge.data.loss_mask import predicted
from distmerge.data.packed import IndexedBatches, open_corpus
from distmerge.integrations.transformers import MergeCallback, one_worker_per_rank
from tests import jobs
from tests.ranks import Ranks
from tests.test_train import FAST, train

MERGE = '[[merge]]\nkind = "diloco"\nevery = 7\nouter_momentum = 0.5\n'
DATA = '[data]\nsource = "files"\nfiles = ["{folder}/text.txt"]\n'
INSTRUCTIONS = '[data]\nformat = "completion"\nsource = "files"\nfiles = ["{folder}/sums.jsonl"]\n'


def write_config(folder: Path, instructions: bool) -> str:
    """A run on prompts whose completions are of very different lengths, or on plain text."""
    rows = [{"prompt": f"{i}: ", "completion": "ab" * (1 + i * i % 12)} for i in range(60)]
    (folder / "sums.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    text = jobs.CONFIG.replace(MERGE, '[[merge]]\nkind = "diloco"\nevery = 4\n')
    return jobs.write_config(folder, text.replace(DATA, INSTRUCTIONS) if instructions else text)


def tokens_in(run: Path, rank: int) -> float:
    """What a rank's merger has counted by the last checkpoint."""
    state = torch.load(run / "checkpoints" / "step-00000012" / f"rank-{rank:05}.pt", weights_only=True)
    return state["mergers"][0]["progress"]["tokens"]


def test_rule_tokens_weighs_workers_by_what_their_loss_was_taken_of(ranks: Ranks, tmp_path: Path) -> None:
    """Two workers of two ranks each, two micro steps a step: the merger of each counts what both of its ranks saw."""
    path = write_config(tmp_path, instructions=True)
    arguments = (path, *FAST, "--train.gradient-accumulation", "2")
    final = {}
    for rule in ("mean", "tokens"):
        run = tmp_path / rule
        train(ranks, 4, *arguments, "--run-dir", str(run), "--merge.0.rule", rule)
        final[rule] = jobs.final_bytes(run)
    assert final["tokens"] != final["mean"]
    section = Data.model_validate(
        {"source": "files", "files": [str(tmp_path / "sums.jsonl")], "format": "completion"}
        | {"sequence_length": 32, "eval_fraction": 0.2}
    )
    rows = open_corpus(section).train
    for worker in range(2):
        seen = 0
        for rank in (2 * worker, 2 * worker + 1):
            batches = IndexedBatches(rows, 0, rank, 4, 2, 2)
            seen += sum(int(predicted(batches.batch(step))) for step in range(12))
        assert tokens_in(tmp_path / "tokens", 2 * worker) == tokens_in(tmp_path / "tokens", 2 * worker + 1) == seen
    assert tokens_in(tmp_path / "tokens", 0) != tokens_in(tmp_path / "tokens", 2)


def test_of_plain_text_every_token_counts_that_is_predicted(ranks: Ranks, tmp_path: Path) -> None:
    path = write_config(tmp_path, instructions=False)
    train(ranks, 2, path, *FAST, "--run-dir", str(tmp_path / "run"), "--train.gradient-accumulation", "3")
    assert tokens_in(tmp_path / "run", 0) == 12 * 3 * 2 * 31  # steps, micro steps, sequences, tokens but the first


# ---- the Trainer of transformers


def dataset(rank: int) -> list[dict[str, Any]]:
    """Sequences of one length, of which worker 1 learns a few tokens and worker 0 most."""
    generator = torch.Generator().manual_seed(rank)
    rows = []
    for index in range(32):
        ids = torch.randint(0, 64, (16,), generator=generator)
        labels = ids.clone()
        labels[: 12 if rank else 2 + index % 3] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def in_trainer(folder: str, rule: str) -> tuple[Tensor, float]:
    """The model after 6 steps of 2 micro steps, and the tokens that its merger heard of."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    rank, _ = one_worker_per_rank()
    rows = dataset(rank)
    arguments = TrainingArguments(
        f"{folder}/worker-{rank}", max_steps=6, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        learning_rate=1e-2, use_cpu=True, report_to=[], save_strategy="no", logging_strategy="no", eval_strategy="steps",
        eval_steps=2, disable_tqdm=True,
    )  # fmt: skip
    callback = MergeCallback(lambda of: dm.DiLoCo(of, every=3, outer_lr=1.0, outer_momentum=0.0, rule=rule, wire="bf16"))
    trainer: Any = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], callbacks=[callback])  # pyright: ignore
    trainer.train()
    merger: Any = callback.merger
    assert not model._forward_pre_hooks, "nothing is left on the model"
    return merger.flat.vector.clone(), merger.progress.tokens


def test_the_trainers_callback_counts_the_labels_of_training(ranks: Ranks, tmp_path: Path) -> None:
    """Evaluations in between don't count, nor does the first label of a sequence, which nothing predicts."""
    plain = ranks.run(2, in_trainer, str(tmp_path), "mean")
    weighed = ranks.run(2, in_trainer, str(tmp_path), "tokens")
    assert torch.equal(weighed[0][0], weighed[1][0])
    assert not torch.equal(weighed[0][0], plain[0][0])
    for theirs in (plain, weighed):
        assert theirs[1][1] == 24 * 4  # 24 sequences, of which 4 tokens each are learned
        assert theirs[0][1] > 24 * 11
