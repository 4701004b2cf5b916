"""Annealing for real: fork a run at a checkpoint, really anneal it, and hold the prediction against the outcome.

The prediction is on disk before the fork takes its first step. ``RUN_DIR/ledger.jsonl`` holds both, one line a fork.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distmerge.checkpoints.store import published_checkpoints, step_of
from distmerge.config import plugins, toml
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.files.atomic import give_name, make_directory, write_atomically
from distmerge.files.directories import guarded, verify
from distmerge.rules.plugins import load_plugins
from distmerge.rundir.identity import Identity, read_identity
from distmerge.windows.prediction import predict

LEDGER = "ledger.jsonl"


def begin_fork(
    run_dir: Path, step: int, decay_steps: int, curve: str, siblings: list[Path], modules: Sequence[str] = ()
) -> tuple[TrainConfig, dict[str, Any]]:
    """Make the fork and write the prediction; the fork's configuration, and its line of the ledger.

    Args:
        siblings: other runs whose ledgers may correct the prediction.
        modules: plugins that the user gives. What only the run's own record names is not imported.

    Raises:
        UserError: where the record names a module that is not given, or anything else is wrong with the run.
    """
    config = configuration_of(run_dir)
    path = run_dir / "config.toml"
    plugins.refuse_stored(str(path), toml.read_table(str(path)), set(modules))
    load_plugins([*modules], "--plugins")
    checkpoint = checkpoint_at(run_dir, step)
    stable = config.steps - (config.schedule.decay if config.schedule.name == "wsd" else 0)
    if config.schedule.name not in ("constant", "wsd") or step > stable or step < config.schedule.warmup:
        raise UserError(f"--from must lie where the learning rate is constant, got {step} of a {config.schedule.name} schedule")
    fork = fork_config(run_dir, config, step, decay_steps, curve, modules)
    entry: dict[str, Any] = {"from": step, "decay_steps": decay_steps, "curve": curve}
    known = [line for line in read_ledger(run_dir) if not same_fork(line, entry)]
    for sibling in siblings:
        check_sibling(sibling, config)
        known += read_ledger(sibling)
    entry |= predict(run_dir, config, entry, known)
    prepare(Path(fork.run_dir), fork, checkpoint, read_identity(run_dir))
    remember(run_dir, entry)
    return fork, entry


def configuration_of(run_dir: Path) -> TrainConfig:
    if not (run_dir / "config.toml").is_file():
        raise UserError(f"RUN_DIR must be a run's directory, got {run_dir}")
    return toml.read_stored(str(run_dir / "config.toml"))


def check_sibling(sibling: Path, config: TrainConfig) -> None:
    """Another run tells of this one only if its seed, and nothing but its seed, differs."""
    differing = toml.differing_keys(configuration_of(sibling), config)
    if differing != ["seed"]:
        in_what = ", ".join(differing) or "nothing"
        raise UserError(f"--calibrate must be a run that differs by its seed alone, {sibling} differs in {in_what}")


def record_outcome(run_dir: Path, fork: TrainConfig, entry: dict[str, Any]) -> str:
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


def fork_config(
    run_dir: Path, config: TrainConfig, step: int, decay_steps: int, curve: str, modules: Sequence[str] = ()
) -> TrainConfig:
    """The run's own configuration with a decay from ``step`` on, in a directory of its own."""
    table = config.model_dump(mode="json", by_alias=True, exclude_none=True)
    table |= {"run_dir": str(run_dir / "anneals" / f"from-{step:08}-{curve}-{decay_steps}"), "steps": step + decay_steps}
    table["schedule"] |= {"name": "wsd", "decay": decay_steps, "curve": curve}
    table.pop("window", None)
    table.pop("preview", None)
    table["plugins"] = [*modules]
    return toml.validate_as(TrainConfig, table)


def prepare(fork: Path, config: TrainConfig, checkpoint: Path, parent: Identity | None) -> None:
    """The fork's directory, with the checkpoint that it goes on from; an interrupted one is resumed as it is."""
    if (fork / "config.toml").exists():
        return

    def make() -> None:
        shutil.rmtree(fork, ignore_errors=True)
        target = fork / "checkpoints" / checkpoint.name
        temporary = target.with_name(f".{target.name}")
        make_directory(target.parent)
        shutil.copytree(checkpoint, temporary, copy_function=os.link)  # published files never change: links are copies
        give_name(temporary, target)
        if parent is not None:
            write_atomically(fork / "environment.json", json.dumps(parent.fork().record(), indent=2) + "\n")
        write_atomically(fork / "config.toml", toml.dump(config))

    guarded(fork, make)


def remember(run_dir: Path, entry: dict[str, Any]) -> None:
    """Write the fork's line of the ledger, in place of the one with its prediction alone."""
    path = run_dir / LEDGER
    kept = [line for line in read_ledger(run_dir) if not same_fork(line, entry)]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in [*kept, entry]))


def read_ledger(run_dir: Path) -> list[dict[str, Any]]:
    """The ledger's lines, one a fork.

    Raises:
        UserError: where it cannot be read.
    """
    path = run_dir / LEDGER
    try:
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away to go on without it") from None


def same_fork(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[name] == b[name] for name in ("from", "decay_steps", "curve"))
