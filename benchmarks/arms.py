"""Training runs that benchmarks compare: real ``distmerge train`` jobs of one small byte-level Llama, finished ones reused."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from report import Report

SEQUENCE_LENGTH = 128
GLOBAL_BATCH = 8  # sequences per step, over all ranks
EVAL_SEQUENCES = 1024
EVERY = 20  # inner steps between merges

MODEL = {
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 264,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "max_position_embeddings": SEQUENCE_LENGTH,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Arm:
    """One way to train. ``workers`` of 1 over several ``ranks`` is data parallelism."""

    name: str
    lr: float
    steps: int
    workers: int = 2
    ranks: int = 2
    merge: tuple[dict[str, Any], ...] = ()

    def config(self, seed: int, run_dir: Path, files: list[str]) -> dict[str, Any]:
        """The whole configuration, for a TOML file."""
        batch_size = GLOBAL_BATCH // self.ranks
        data: dict[str, Any] = {"source": "files", "files": files} if files else {"source": "stdlib"}
        return {
            "run_dir": str(run_dir),
            "seed": seed,
            "steps": self.steps,
            "mesh": {"workers": self.workers, "device": "cpu"},
            "model": {"config": MODEL},
            "data": data | {"sequence_length": SEQUENCE_LENGTH},
            "train": {"batch_size": batch_size},
            "optimizer": {"lr": self.lr},
            "schedule": {"name": "wsd", "warmup": self.steps // 20, "decay": self.steps // 4},
            "merge": list(self.merge),
            "evaluate": {"every": max(EVERY, min(200, self.steps // 5)), "sequences": EVAL_SEQUENCES},
            "checkpoint": {"every": max(EVERY, self.steps // 4), "keep": 1},
            "log": {"every": 50},
        }


@dataclass(frozen=True)
class Outcome:
    """One arm on several seeds, in order: final held-out losses (nats per token), losses by step, training seconds."""

    losses: list[float]
    curves: list[dict[int, float]]
    seconds: list[float]

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)

    def curve(self) -> dict[int, float]:
        """The mean over the seeds."""
        return {step: statistics.mean(curve[step] for curve in self.curves) for step in self.curves[0]}


class Runs:
    """Trains arms, each in a run directory of its own; one that is finished is not trained again.

    Attributes:
        outcomes: what came out, by arm and steps.
    """

    def __init__(self, report: Report, files: list[str]):
        self.report, self.files = report, files
        self.outcomes: dict[str, Outcome] = {}

    def outcome(self, arm: Arm, seeds: list[int]) -> Outcome:
        """Train the arm on the seeds."""
        outcome = Outcome([], [], [])
        for seed in seeds:
            name = f"{arm.name}-steps{arm.steps}-seed{seed}"
            run_dir = self.train(arm, seed, name)
            summary = json.loads((run_dir / "summary.json").read_text())
            outcome.losses.append(summary["eval_loss_last"])
            outcome.seconds.append(summary["tokens"] / summary["tokens_per_second"])
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            outcome.curves.append({line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line})
            self.report.say(f"{name}: eval loss {outcome.losses[-1]:.4f}")
        self.outcomes[f"{arm.name}-steps{arm.steps}"] = outcome
        return outcome

    def train(self, arm: Arm, seed: int, name: str) -> Path:
        """The directory of the finished run; the trainer itself resumes one that is not."""
        run_dir, path, log_path = (self.report.out / (name + suffix) for suffix in ("", ".toml", ".log"))
        text = tomli_w.dumps(arm.config(seed, run_dir, self.files))
        if (run_dir / "summary.json").exists() and path.read_text() == text:
            return run_dir
        path.write_text(text)
        with open(log_path, "w") as log:
            command = [sys.executable, "-m", "distmerge", "train", str(path), "--ranks", str(arm.ranks)]
            status = subprocess.run(command, stdout=log, stderr=log).returncode
        if status:
            sys.exit(f"{name} failed with status {status}:\n{log_path.read_text()[-2000:]}")
        return run_dir


def diloco(lr: float, steps: int, outer_lr: float, outer_momentum: float, every: int = EVERY, workers: int = 2) -> Arm:
    entry = {"kind": "diloco", "every": every, "outer_lr": outer_lr, "outer_momentum": outer_momentum}
    name = f"diloco{workers}-lr{lr:g}-every{every}-outer{outer_lr:g},{outer_momentum:g}"
    return Arm(name, lr, steps, workers, workers, (entry,))


def data_parallel(lr: float, steps: int) -> Arm:
    return Arm(f"data-parallel-lr{lr:g}", lr, steps, workers=1)


def mixed(name: str, lr: float, steps: int, *merge: dict[str, Any], workers: int = 2) -> Arm:
    """An arm with any list of merges."""
    return Arm(name, lr, steps, workers, workers, merge)


def gap(arm: Outcome, baseline: Outcome) -> float:
    """How much higher the arm's mean loss is, as a share of the baseline's."""
    return arm.loss / baseline.loss - 1


def gap_on_the_way(arm: Outcome, baseline: Outcome) -> dict[int, float]:
    """The same at each step at which both were evaluated."""
    theirs = baseline.curve()
    return {step: loss / theirs[step] - 1 for step, loss in arm.curve().items() if step in theirs}
