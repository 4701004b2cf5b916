"""``distmerge anneal``: fork a run at a checkpoint, really anneal it, and hold the preview against the outcome.

The prediction is on disk before the fork takes its first step: the loss of the merged window of the same steps, where the
run has gone that far, else of the newest blocks up to the fork. ``RUN_DIR/ledger.jsonl`` holds both, one line a fork.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from distmerge import config_file
from distmerge.checkpoints.block import Block, accumulate, published_blocks, read_block
from distmerge.checkpoints.durable import guarded, verify
from distmerge.checkpoints.store import published_checkpoints, step_of
from distmerge.checkpoints.window import block_weights
from distmerge.config import TrainConfig
from distmerge.errors import UserError
from distmerge.rundir import write_atomically

LEDGER = "ledger.jsonl"


def begin(run_dir: Path, step: int, decay_steps: int, curve: str) -> tuple[TrainConfig, dict[str, Any]]:
    """Make the fork and write the prediction; the fork's configuration, and its line of the ledger."""
    if not (run_dir / "config.toml").is_file():
        raise UserError(f"RUN_DIR must be a run's directory, got {run_dir}")
    config = config_file.read(str(run_dir / "config.toml"), [])
    checkpoint = checkpoint_at(run_dir, step)
    stable = config.steps - (config.schedule.decay if config.schedule.name == "wsd" else 0)
    if config.schedule.name not in ("constant", "wsd") or step > stable or step < config.schedule.warmup:
        raise UserError(f"--from must lie where the learning rate is constant, got {step} of a {config.schedule.name} schedule")
    fork = fork_config(run_dir, config, step, decay_steps, curve)
    prediction = predict(run_dir, config, step, decay_steps, curve)
    prepare(Path(fork.run_dir), fork, checkpoint)
    entry = {"from": step, "decay_steps": decay_steps, "curve": curve} | prediction
    remember(run_dir, entry)
    return fork, entry


def finish(run_dir: Path, fork: TrainConfig, entry: dict[str, Any]) -> str:
    """Write the outcome beside the prediction; both, in words."""
    outcome = json.loads((Path(fork.run_dir) / "summary.json").read_text())["eval_loss_last"]
    remember(run_dir, entry | {"outcome": outcome, "error": relative(entry["predicted"], outcome)})
    said = entry["basis"] if entry["predicted"] is None else f"predicted {entry['predicted']:.4f} by {entry['basis']}"
    return f"annealed {outcome:.4f}; {said}; written to {run_dir / LEDGER}"


def relative(predicted: float | None, outcome: float) -> float | None:
    return None if predicted is None else predicted / outcome - 1


def checkpoint_at(run_dir: Path, step: int) -> Path:
    steps = {step_of(path): path for path in published_checkpoints(run_dir / "checkpoints")}
    if step not in steps:
        raise UserError(f"--from must be a checkpoint's step, one of {', '.join(map(str, steps)) or 'none'}, got {step}")
    if problem := verify(steps[step]):
        raise UserError(f"{steps[step]} is damaged: {problem}")
    return steps[step]


def fork_config(run_dir: Path, config: TrainConfig, step: int, decay_steps: int, curve: str) -> TrainConfig:
    """The run's own configuration with a decay from ``step`` on, in a directory of its own."""
    table = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    table |= {"run_dir": str(run_dir / "anneals" / f"from-{step:08}-{curve}-{decay_steps}"), "steps": step + decay_steps}
    table["schedule"] |= {"name": "wsd", "decay": decay_steps, "curve": curve}
    table.pop("window", None)
    table.pop("preview", None)
    return config_file.validate(table)


def prepare(fork: Path, config: TrainConfig, checkpoint: Path) -> None:
    """The fork's directory, with the checkpoint that it goes on from; an interrupted one is resumed as it is."""
    if (fork / "config.toml").exists():
        return

    def make() -> None:
        shutil.rmtree(fork, ignore_errors=True)
        target = fork / "checkpoints" / checkpoint.name
        shutil.copytree(checkpoint, target, copy_function=os.link)  # published files never change: links are copies
        write_atomically(fork / "config.toml", config_file.dump(config))

    guarded(fork, make)


def remember(run_dir: Path, entry: dict[str, Any]) -> None:
    """Write the fork's line of the ledger, in place of the one with its prediction alone."""
    path = run_dir / LEDGER
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    key = ("from", "decay_steps", "curve")
    kept = [line for line in lines if [line[name] for name in key] != [entry[name] for name in key]]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in [*kept, entry]))


def predict(run_dir: Path, config: TrainConfig, step: int, decay_steps: int, curve: str) -> dict[str, Any]:
    """The loss of the merged window, and of which blocks."""
    blocks = [read_block(path) for path in published_blocks(run_dir / "window")]
    inside = [block for block in blocks if step < block.first_step and block.last_step <= step + decay_steps]
    covered = sum(block.last_step - block.first_step + 1 for block in inside) >= 0.9 * decay_steps
    before = [block for block in blocks if step - decay_steps < block.first_step and block.last_step <= step]
    chosen = [block for block in (inside if covered else before) if not block.tainted]
    if len(chosen) < 2:
        return {"predicted": None, "basis": "no prediction: fewer than two blocks of that length"}
    basis = f"{chosen[0].name} to {chosen[-1].name}" + ("" if covered else ", which end where the decay begins")
    return {"predicted": merged_loss(run_dir, config, chosen, curve), "basis": basis}


def merged_loss(run_dir: Path, config: TrainConfig, blocks: list[Block], curve: str) -> float:
    """As the run itself evaluates, on the same held-out text."""
    import torch

    from distmerge.data import open_corpus
    from distmerge.evaluate import evaluate
    from distmerge.model import load_model

    if config.data.streaming:
        raise UserError("config.data.streaming must be false for a prediction, got true")
    model = load_model(str(run_dir / "window" / blocks[-1].name))
    views = {name: parameter.data for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for view in views.values():
            view.zero_()
        for block, weight in zip(blocks, block_weights(curve, blocks), strict=True):
            accumulate(run_dir / "window" / block.name, weight, views)
    return evaluate(model, open_corpus(config.data).held_out, config.train.batch_size, config.evaluate.batches).loss
