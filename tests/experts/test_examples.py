"""Per-example tracking against brute force: every example alone, every step's model read back from disk."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from distmerge.config import toml
from distmerge.config.experts import Examples
from distmerge.data.loss_mask import ids_and_labels
from distmerge.data.packed import open_corpus
from distmerge.experts.examples import Known, Scores, nothing_known, observe, token_scores, tracked_rows
from distmerge.experts.retention import report
from distmerge.model import load_model
from tests.checkpoints.runs import forget_after, run, same, write_text
from tests.ranks import command
from tests.test_instructions import write_examples


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, an expert on completions with its examples tracked, and one of another seed."""
    folder = tmp_path_factory.mktemp("tracked")
    text = write_text(folder)
    base = run(folder, "base", text, steps=5)
    rows = write_examples(folder, 60)
    sections: dict[str, Any] = {
        "model": {"path": str(base / "final")},
        "expert": {"skill": "sums"},
        "data": {"files": [rows], "format": "completion", "sequence_length": 24},
        "steps": 48,
        "optimizer": {"lr": 2e-2},
        "examples": {"track": True, "count": 20, "early": 4, "learned": 0.6},
        "checkpoint": {"every": 8, "at": "powers-of-two"},
    }
    found = {name: run(folder, name, text, **sections | {"seed": seed}) for name, seed in (("one", 1), ("two", 2))}
    forget_after(found["one"], 16)
    before = load_file(found["one"] / "examples.safetensors")
    run(folder, "one", text, **sections | {"seed": 1})
    assert same(before, load_file(found["one"] / "examples.safetensors"))  # a resume forgets no event
    return found | {"base": base}


def alone(directory: Path, row: np.ndarray) -> tuple[float, float, int, list[bool]]:
    """One example through one model, token by token: loss, EL2N, targets, which are right."""
    model = load_model(str(directory)).eval()
    ids, labels = ids_and_labels(torch.from_numpy(np.asarray(row, dtype=np.int64)))
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0].double()
    losses, errors, right = [], [], []
    for at in range(len(ids) - 1):
        wanted = int(labels[at + 1])
        if wanted < 0:
            continue
        p = logits[at].softmax(0)
        onehot = torch.zeros_like(p)
        onehot[wanted] = 1
        losses.append(float(cross_entropy(logits[at], labels[at + 1])))
        errors.append(float((p - onehot).norm()))
        right.append(int(logits[at].argmax()) == wanted)
    return float(np.mean(losses)), float(np.mean(errors)), len(right), right


def test_tracking_is_exact(runs: dict[str, Path]) -> None:
    made = runs["one"]
    config = toml.read(str(made / "config.toml"), [])
    data = open_corpus(config.data).train
    known = Known(**load_file(made / "examples.safetensors"))
    rows = tracked_rows(len(data), 20, 1)
    assert len(rows) == len(set(rows)) == len(known.loss) == 20
    assert sum(value.element_size() for value in known) == 19
    steps = sorted((made / "steps").iterdir())
    for index, row in enumerate(rows[:8]):
        seen = [(int(path.name[5:]), *alone(path, data[[row]]["input_ids"][0])) for path in steps]
        learned = [sum(right) >= 0.6 * count for _, _, _, count, right in seen]
        first = next((step for (step, *_), yes in zip(seen, learned, strict=True) if yes), 0)
        events = sum(a and not b for a, b in itertools.pairwise(learned))
        assert int(known.first_learned[index]) == first
        assert int(known.forgotten[index]) == events
        assert bool(known.learned[index]) == learned[-1]
        assert float(known.loss[index]) == pytest.approx(seen[-1][1], rel=1e-4)
        assert float(known.before[index]) == pytest.approx(seen[-2][1], rel=1e-4)
        assert float(known.difficulty[index]) == pytest.approx(next(s[2] for s in seen if s[0] >= 4), rel=1e-4)
    assert known.first_learned.unique().numel() > 1


def test_the_report_is_exact(runs: dict[str, Path], tmp_path: Path) -> None:
    made = runs["one"]
    merged = tmp_path / "merged"
    models = f"--model {made}/final --model {runs['two']}/final"
    assert (
        command(
            f"merge --method task_arithmetic --lambda 0.5 --base {runs['base']}/final {models} --out {merged}".split()
        ).status
        == 0
    )
    judge = runs["two"] / "steps" / "step-00000004"
    found = report(made, str(merged), str(judge))
    config = toml.read(str(made / "config.toml"), [])
    data = open_corpus(config.data).train
    rows = [data[[row]]["input_ids"][0] for row in tracked_rows(len(data), 20, 1)]
    by = {name: [alone(path, row) for row in rows] for name, path in (("e", made / "final"), ("m", merged), ("j", judge))}
    order = sorted(range(20), key=lambda index: by["j"][index][1])
    total = sum(by["e"][index][0] for index in range(20))
    for decile, row in enumerate(found["deciles"]):
        part = order[2 * decile : 2 * decile + 2]
        own = [(e, m) for index in part for e, m in zip(by["e"][index][3], by["m"][index][3], strict=True)]
        kept = sum(e and m for e, m in own) / max(1, sum(e for e, _ in own))
        assert row["retention"] == pytest.approx(kept)
        assert row["loss_share"] == pytest.approx(sum(by["e"][index][0] for index in part) / total, rel=1e-4)
        assert row["merge_loss"] == pytest.approx(np.mean([by["m"][index][0] for index in part]), rel=1e-4)
    assert sum(row["loss_share"] for row in found["deciles"]) == pytest.approx(1)
    assert sum(row["gain_share"] for row in found["deciles"]) == pytest.approx(1)
    outcome = command(f"examples {made} --merged {merged} --judge {judge} --out {tmp_path}/report".split())
    assert outcome.status == 0 and "retention" in outcome.stdout, outcome.stderr
    assert json.loads((tmp_path / "report" / "examples.json").read_text()) == found
    assert (tmp_path / "report" / "examples.png").stat().st_size > 5000


def test_events_by_hand() -> None:
    section = Examples(track=True, early=2, learned=0.5)
    known = nothing_known(3)
    rights = [[0, 1, 2], [1, 0, 2], [2, 1, 0], [0, 0, 1]]  # of 2 targets each
    for step, right in zip((1, 2, 4, 8), rights, strict=True):
        zeros = torch.zeros(3, dtype=torch.float64)
        known = observe(known, Scores(zeros + step, zeros + step, zeros + 2, torch.tensor(right).double()), step, section)
    assert known.first_learned.tolist() == [2, 1, 1]
    assert known.forgotten.tolist() == [1, 2, 1]
    assert known.learned.tolist() == [False, False, True]
    assert known.difficulty.tolist() == [2, 2, 2] and known.before.tolist() == [4, 4, 4]


def test_classifiers_have_one_target() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    loss, error, right = token_scores(logits, torch.tensor([0, 0]))
    p = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))
    assert loss.tolist() == pytest.approx([-math.log(p[0]), -math.log(p[1])])
    assert error.tolist() == pytest.approx([math.sqrt(2) * (1 - p[0]), math.sqrt(2) * (1 - p[1])])
    assert right.tolist() == [True, False]


def test_what_was_not_tracked_is_refused(runs: dict[str, Path]) -> None:
    outcome = command(f"examples {runs['base']} --merged x".split())
    assert outcome.status == 2 and "with examples.track = true" in outcome.stderr
