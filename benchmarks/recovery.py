"""Injected divergence: is it found, and is merging the last stable checkpoints better than a plain roll-back?

Three injections (learning rate x10 for 10 steps; 3 batches of random tokens; a step whose gradient is NaN), each on several
seeds, each with one or three checkpoints merged and with the moments rolled back, reset, kept or averaged. Beside them the
clean run of the same seed, watched, which must raise no alarm. Every run takes the same number of steps in the end.

    python benchmarks/recovery.py [--small] [--seeds N] [--out DIR] [--record]
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import shutil
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import Report, parser, spread

from distmerge import config_file
from distmerge.checkpoints.recovery import Recovery
from distmerge.data import open_corpus
from distmerge.engine.engine import StepResult
from distmerge.engine.torch import TorchEngine
from distmerge.launch import Place
from distmerge.train import train

AT = 150
"""The first injected step, counted from 1."""

INJECTIONS = ("rate", "batches", "nan")
OPTIMIZERS = ("rollback", "reset", "keep", "average")


class Arm(NamedTuple):
    """A run: what is injected ("" for nothing), how many checkpoints are merged, what becomes of the moments."""

    injection: str
    merge_last: int
    optimizer: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.injection or 'clean'}-{self.merge_last}-{self.optimizer}-{self.seed}"


def table(arm: Arm, run_dir: Path, steps: int) -> dict[str, Any]:
    model = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    recovery = {"enabled": True, "merge_last": arm.merge_last, "keep_optimizer": arm.optimizer, "skip_batches": 10}
    return {
        "run_dir": str(run_dir),
        "seed": arm.seed,
        "steps": steps,
        "mesh": {"device": "cpu"},
        "model": {"config": model},
        "train": {"batch_size": 8, "threads": 1},
        "optimizer": {"lr": 4e-3},
        "schedule": {"warmup": 20},
        "evaluate": {"every": steps, "batches": 64},
        "checkpoint": {"every": 10, "keep": 5},
        "recovery": recovery,
        "log": {"every": 50},
    }


def run(arm: Arm, out: Path, steps: int) -> dict[str, Any]:
    """One run in this process; what became of it."""
    real, real_roll_back, calls, over = TorchEngine.train_step, Recovery.roll_back, 0, False

    def roll_back(self: Recovery, step: int) -> None:
        nonlocal over
        over = True  # the cause is gone with the roll-back: what is compared is what it leaves behind
        real_roll_back(self, step)

    def train_step(self: TorchEngine, batch: torch.Tensor, lr: float) -> StepResult:
        nonlocal calls
        calls += 1
        if arm.injection == "rate" and AT <= calls < AT + 10 and not over:
            lr *= 10
        if arm.injection == "batches" and AT <= calls < AT + 3 and not over:
            batch = torch.randint(3, 259, batch.shape)
        result = real(self, batch, lr)
        if arm.injection == "nan" and calls == AT:
            self.parameters.whole.fill_(math.nan)
            return StepResult(result.loss, result.grad_norm * math.nan)
        return result

    run_dir = out / arm.name
    shutil.rmtree(run_dir, ignore_errors=True)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    TorchEngine.train_step, Recovery.roll_back = train_step, roll_back
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            train(config_file.validate(table(arm, run_dir, steps)), Place(0, 1, 0, 1), ["benchmark"])
    finally:
        TorchEngine.train_step, Recovery.roll_back = real, real_roll_back
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    spikes = [line["step"] for line in lines if line["event"] == "spike"]
    backs = [line["to"] for line in lines if "rolled back" in line["event"]]
    loss = json.loads((run_dir / "summary.json").read_text())["eval_loss_last"]
    shutil.rmtree(run_dir)
    return {"arm": arm._asdict(), "spikes": spikes, "to": backs, "loss": loss, "steps_run": calls, "steps_lost": calls - steps}


def main() -> None:
    options = parser(__doc__, seeds=5).parse_args()
    report = Report("recovery", options)
    steps, seeds = (180, 1) if options.small else (210, options.seeds)
    arms = [Arm("", 1, "rollback", seed) for seed in range(seeds)]
    arms += [
        Arm(injection, merge_last, optimizer, seed)
        for seed in range(seeds)
        for injection in INJECTIONS
        for merge_last in (1, 3)
        for optimizer in OPTIMIZERS
        if not (optimizer == "average" and merge_last == 1)
    ]
    open_corpus(config_file.validate(table(arms[0], report.out, steps)).data)  # fills the cache once
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(run, arms, [report.out] * len(arms), [steps] * len(arms)))
    report.data["results"] = results
    judge(report, results)
    report.finish()


def judge(report: Report, results: list[dict[str, Any]]) -> None:
    clean = {result["arm"]["seed"]: result for result in results if not result["arm"]["injection"]}
    sick = [result for result in results if result["arm"]["injection"]]
    missed = [result for result in sick if not result["spikes"]]
    delays = [result["spikes"][0] - AT for result in sick if result["spikes"]]
    report.data |= {"delays": spread([float(delay) for delay in delays]), "missed": len(missed)}
    table: dict[str, Any] = {}
    for injection in INJECTIONS:
        for merge_last in (1, 3):
            for optimizer in OPTIMIZERS:
                arm = (injection, merge_last, optimizer)
                found = [result for result in sick if tuple(result["arm"].values())[:3] == arm]
                if found:
                    excess = [result["loss"] - clean[result["arm"]["seed"]]["loss"] for result in found]
                    lost = statistics.mean(result["steps_lost"] for result in found)
                    table[f"{injection} merge {merge_last} {optimizer}"] = {
                        "excess": spread(excess), "mean_excess": statistics.mean(excess), "steps_lost": lost,
                    }  # fmt: skip
    report.data["table"] = table
    for name, row in table.items():
        report.say(f"{name:<28} loss above the clean run {row['mean_excess']:+.4f}, steps lost {row['steps_lost']:.0f}")
    report.bar("injections that were missed", len(missed), "<=", 0)
    report.bar("steps until the last injection was detected", max(delays, default=math.inf), "<=", 5)
    report.bar("alarms in clean runs", sum(len(result["spikes"]) for result in clean.values()), "<=", 0)
    gains = [
        table[f"{injection} merge 1 {optimizer}"]["mean_excess"] - table[f"{injection} merge 3 {optimizer}"]["mean_excess"]
        for injection in INJECTIONS
        for optimizer in ("rollback", "reset", "keep")
    ]
    report.data["merge_gain"] = gains
    report.say(f"merging three instead of one lowers the loss by {statistics.mean(gains):+.4f} on average")


if __name__ == "__main__":
    main()
