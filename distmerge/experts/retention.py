"""``distmerge examples``: which training examples an expert has learned, and which of them a merge retained, by difficulty.

Difficulty that is measured in the same run is circular: examples that are hard early in a run are those that it learns late.
With ``--judge``, a model of another seed measures the difficulty instead.
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
from distmerge.experts.examples import IGNORED, Known, predictions, rows_of, score_rows, scores_of, token_scores, tracked_rows
from distmerge.files.atomic import write_atomically
from distmerge.merging.in_memory import read_model
from distmerge.model import load_model
from distmerge.theta.flat import FlatParameters

FILE = "examples.safetensors"
BATCH = 32
DECILES = 10


def report(run_dir: Path, merged: str, judge: str | None) -> dict[str, Any]:
    """Compare an expert with a merge of it on the examples that the expert's run tracked.

    Args:
        merged: the merge's model directory.
        judge: a model whose EL2N is the difficulty; None for the run's own EL2N, early in training.

    Returns:
        the report as a JSON object.

    Raises:
        UserError: when the run is not an expert's, did not track examples, or has no difficulty.
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
        difficulty = score_rows(model, data, rows, BATCH).el2n
    if difficulty.isnan().any():
        raise UserError("the difficulty is not known: examples.early must be <= the run's last step, or --judge must be given")
    targets, right, losses = compare(theta, vectors, data, rows)
    return {
        "run": str(run_dir),
        "merged": merged,
        "judge": judge,
        "examples": len(rows),
        "bytes_per_example": sum(value.element_size() for value in known),
        "right": {name: float(right[name].sum() / targets.sum()) for name in vectors},
        "deciles": by_decile(difficulty, known, losses, right),
    }


def compare(
    theta: Theta, vectors: dict[str, Tensor], data: Any, rows: np.ndarray
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Evaluate the models ``vectors`` on some rows.

    Returns:
        for each of the N rows: the number of targets ``[N]``; by model, and as "both", the number that is predicted right
        ``[N]``; and by model the mean loss ``[N]``.
    """
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
    """Statistics for each tenth of the examples, the easiest first. Equally difficult examples keep their order.

    ``loss_share`` is the tenth's share of the expert's loss, ``gain_share`` its share of what the loss fell by since the
    previous published step (it can be negative). ``retention`` is P(merge right | expert right) over the targets.
    ``first_learned`` is a median, ``forgotten`` the mean number of forgetting events.
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
    """The statistics of a tenth of the examples that come from the run's own passes."""
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
    """Write the report as examples.json and examples.png into ``out``."""
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
    """The report as text for a terminal."""
    rows = found["deciles"]
    keys = list(rows[0])
    lines = ["decile" + "".join(f"{key:>15}" for key in keys)]
    lines += [f"{index + 1:>6}" + "".join(f"{row[key]:15.4f}" for key in keys) for index, row in enumerate(rows)]
    said = ", ".join(f"{name} {value:.1%}" for name, value in found["right"].items())
    return "\n".join([*lines, f"targets predicted right: {said}; {found['examples']} examples"])
