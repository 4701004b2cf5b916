"""``distmerge examples``: what an expert memorised late, and what of it a merge kept; by difficulty.

Difficulty that a run scores itself is circular: what it finds hard early it learns late. ``--judge``, a model of another seed,
scores it instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from distmerge.config import toml
from distmerge.data.packed import open_corpus
from distmerge.errors import UserError
from distmerge.experts.adapt import Theta
from distmerge.experts.examples import IGNORED, Known, look, predictions, rows_of, scores_of, token_scores, tracked_rows
from distmerge.files.atomic import write_atomically
from distmerge.merging.in_memory import read_model
from distmerge.model import load_model
from distmerge.theta.flat import FlatParameters

FILE = "examples.safetensors"
BATCH = 32
DECILES = 10


def report(run_dir: Path, merged: str, judge: str | None) -> dict[str, Any]:
    """What is known of a run's tracked examples, against a merge of its model.

    Args:
        merged: a model directory.
        judge: a model whose EL2N is the difficulty; by default the run's own, early.

    Raises:
        UserError: when the run tracked none.
    """
    if not (run_dir / FILE).exists():
        raise UserError(f"RUN_DIR must be a finished run with examples.track = true, got {run_dir}")
    config = toml.read_stored(str(run_dir / "config.toml"))
    if config.expert is None or config.model.path is None:
        raise UserError(f"RUN_DIR must be an expert's run, got {run_dir}")
    known = Known(**load_file(run_dir / FILE))
    data = open_corpus(config.data).train
    rows = tracked_rows(len(data), len(known.loss), config.seed)
    origin = config.expert.base or config.model.path
    model = load_model(origin)
    theta = Theta(model, FlatParameters(model))
    vectors = {
        name: theta.of(read_model(path, origin)) for name, path in (("expert", str(run_dir / "final")), ("merge", merged))
    }
    difficulty = known.difficulty.double()
    if judge is not None:
        theta.write(theta.of(read_model(judge, origin)))
        difficulty = look(model, data, rows, BATCH).el2n
    if difficulty.isnan().any():
        raise UserError("examples.early must be <= the run's steps, or --judge be given: nothing says what is hard")
    targets, right, losses = compared(theta, vectors, data, rows)
    return {
        "run": str(run_dir),
        "merged": merged,
        "judge": judge,
        "examples": len(rows),
        "bytes_per_example": sum(value.element_size() for value in known),
        "right": {name: float(right[name].sum() / targets.sum()) for name in vectors},
        "deciles": by_decile(difficulty, known, losses, right),
    }


def compared(theta: Theta, vectors: dict[str, Tensor], data: Any, rows: np.ndarray) -> tuple[Tensor, dict[str, Tensor], dict]:
    """Targets ``[N]``, those that each model has right and that both have, and each model's losses ``[N]``."""
    correct: dict[str, list[Tensor]] = {name: [] for name in vectors}
    losses: dict[str, list[Tensor]] = {name: [] for name in vectors}
    targets: list[Tensor] = []
    for name, vector in vectors.items():
        theta.write(vector)
        theta.model.eval()
        for at in range(0, len(rows), BATCH):
            logits, labels = predictions(theta.model, rows_of(data, rows[at : at + BATCH]))
            counted = labels != IGNORED
            loss, error, right = token_scores(logits, labels)
            losses[name].append(scores_of(loss, error, right, counted).loss)
            correct[name].append(right)
            if name == next(iter(vectors)):
                targets.append(counted.sum(1).double())
    hits = {name: torch.cat(found) for name, found in correct.items()}
    both = torch.stack(list(hits.values())).all(0)
    found = {name: value.sum(1).double() for name, value in (hits | {"both": both}).items()}
    return torch.cat(targets), found, {name: torch.cat(value) for name, value in losses.items()}


def by_decile(
    difficulty: Tensor, known: Known | None, losses: dict[str, Tensor], right: dict[str, Tensor]
) -> list[dict[str, float]]:
    """A row for each tenth of the examples, the easiest first; of equally hard ones the first comes first.

    ``loss_share``: of the expert's loss; ``gain_share``: of what the last published step lowered it by (can be below 0);
    ``retention``: P(merge right | expert right), over targets; medians of the first-learned step; mean forgetting events.
    """
    order = difficulty.argsort(stable=True)
    parts = [order[len(order) * k // DECILES : len(order) * (k + 1) // DECILES] for k in range(DECILES)]
    whole = float(losses["expert"].sum())
    rows = []
    for part in parts:
        row = {
            "difficulty": float(difficulty[part].mean()) if len(part) else 0.0,
            "loss_share": float(losses["expert"][part].sum()) / whole if whole else 0.0,
            "expert_loss": float(losses["expert"][part].mean()) if len(part) else 0.0,
            "merge_loss": float(losses["merge"][part].mean()) if len(part) else 0.0,
            "retention": float(right["both"][part].sum() / right["expert"][part].sum().clamp(min=1)),
        }
        rows.append(row if known is None else row | history(known, part))
    return rows


def history(known: Known, part: Tensor) -> dict[str, float]:
    gains = (known.before - known.loss).double()
    total = float(gains.sum())
    first = known.first_learned[part]
    return {
        "gain_share": float(gains[part].sum()) / total if total else 0.0,
        "first_learned": float(first[first > 0].double().median()) if (first > 0).any() else 0.0,
        "never_learned": float((first == 0).double().mean()) if len(part) else 0.0,
        "forgotten": float(known.forgotten[part].double().mean()) if len(part) else 0.0,
    }


def write(found: dict[str, Any], out: Path) -> None:
    """examples.json and examples.png in ``out``."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "examples.json", json.dumps(found, indent=1) + "\n")
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    deciles, rows = range(1, DECILES + 1), found["deciles"]
    left.bar(deciles, [row["loss_share"] for row in rows])
    left.set(title="share of the expert's loss", xlabel="difficulty, decile")
    middle.plot(deciles, [row["expert_loss"] for row in rows], marker="o", label="expert")
    middle.plot(deciles, [row["merge_loss"] for row in rows], marker="o", label="merge")
    middle.set(title="loss", xlabel="difficulty, decile")
    middle.legend()
    right.plot(deciles, [row["retention"] for row in rows], marker="o")
    right.set(title="P(merge right | expert right)", xlabel="difficulty, decile", ylim=(0, 1))
    figure.savefig(out / "examples.png", dpi=110)


def table(found: dict[str, Any]) -> str:
    """The report for a terminal."""
    rows = found["deciles"]
    keys = list(rows[0])
    lines = ["decile" + "".join(f"{key:>15}" for key in keys)]
    lines += [f"{index + 1:>6}" + "".join(f"{row[key]:15.4f}" for key in keys) for index, row in enumerate(rows)]
    said = ", ".join(f"{name} {value:.1%}" for name, value in found["right"].items())
    return "\n".join([*lines, f"targets that are right: {said}; {found['examples']} examples"])
