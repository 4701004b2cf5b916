"""Injected divergence: is it found, and is merging the last stable checkpoints better than a plain roll-back?

Four injections, each on several seeds. Two heal by themselves (a learning rate of ten times for 10 steps; 3 batches of random
tokens): they must be suspected soon, and what they cost without a roll-back is measured. Two do not: a step whose gradient is
NaN, with one or three checkpoints merged and with the moments rolled back, reset, kept or averaged; and a learning rate that
grows by a tenth a step until the run goes back. Beside them the clean run of the same seed, watched and far longer, which must
raise no alarm. All runs of a seed share their first steps, and all that are compared end at the same step. Then the NaN
gradient on one of two workers: the other must not notice.

An injection counts as found at the step from which blocks and checkpoints are held, or the run goes back, whichever is first.

    python benchmarks/recovery.py [--small] [--seeds N] [--out DIR] [--record]

Finished runs lie in OUT/recovery/ARM.json and are not run again.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import os
import shutil
import socket
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import Report, parser, remembered, spread

from distmerge.config import toml
from distmerge.data.packed import open_corpus
from distmerge.engine.engine import StepResult
from distmerge.engine.torch import TorchEngine
from distmerge.launch.ranks import Place
from distmerge.recovery.response import Recovery
from distmerge.trainer.loop import train

PREFIX = 140
"""Steps that all runs of a seed share."""

FIRST_SEED = 50
"""The detector was designed on the losses of smaller seeds."""

AT = 150
"""The first injected step, counted from 1."""

OPTIMIZERS = ("rollback", "reset", "keep", "average")

WAYS: dict[str, list[tuple[int, str]]] = {
    "rate": [(1, "rollback")],
    "batches": [(1, "rollback")],
    "nan": [(count, optimizer) for count in (1, 3) for optimizer in OPTIMIZERS if (count, optimizer) != (1, "average")],
    "growing": [(1, "rollback"), (3, "rollback")],
}
"""The injections, and the ways to go on that are tried after each: checkpoints merged, and what becomes of the moments."""


class Arm(NamedTuple):
    """A run: what is injected ("" for nothing), how many checkpoints are merged, what becomes of the moments, its last
    step, and its workers."""

    injection: str
    merge_last: int
    optimizer: str
    seed: int
    steps: int
    workers: int = 1

    @property
    def name(self) -> str:
        kind = self.injection or "clean"
        return f"{kind}-{self.merge_last}-{self.optimizer}-{self.seed}-{self.steps}-{self.workers}"


def table(arm: Arm, run_dir: Path) -> dict[str, Any]:
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
        "steps": arm.steps,
        "mesh": {"device": "cpu", "workers": arm.workers},
        "model": {"config": model},
        "train": {"batch_size": 8 // arm.workers, "threads": 1},
        "optimizer": {"lr": 4e-3},
        "schedule": {"warmup": 20},
        "merge": [{"kind": "average", "every": 10}] if arm.workers > 1 else [],
        "evaluate": {"every": 10**6, "sequences": 512},
        "checkpoint": {"every": 10, "keep": 5},
        "recovery": recovery,
        "log": {"every": 50},
    }


def prepare(seed: int, out: Path) -> None:
    """The shared first steps of a seed's runs."""
    arm = Arm("", 1, "rollback", seed, PREFIX)
    if not (out / arm.name / "summary.json").exists():
        start(arm, Place(0, 1, 0, 1), out)


def measure(arm: Arm, out: Path) -> dict[str, Any]:
    key = {"arm": list(arm), "table": table(arm, Path("run")), "prefix": PREFIX, "at": AT}
    return remembered(out / f"{arm.name}.json", key, lambda: outcome(arm, out))


def outcome(arm: Arm, out: Path) -> dict[str, Any]:
    """One run, and what became of it."""
    run_dir = out / arm.name
    shutil.rmtree(run_dir, ignore_errors=True)
    if arm.workers == 1:
        shared = out / Arm("", 1, "rollback", arm.seed, PREFIX).name
        shutil.copytree(shared / "checkpoints", run_dir / "checkpoints")
        for name in ("config.toml", "environment.json", "metrics.jsonl", "events.jsonl"):  # it is the same run
            shutil.copy(shared / name, run_dir / name)
        calls = PREFIX + start(arm, Place(0, 1, 0, 1), out)
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(one_of, (arm, out, port), nprocs=arm.workers)  # pyright: ignore
        calls = arm.steps
    lines = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    loss = json.loads((run_dir / "summary.json").read_text())["eval_loss_last"]
    shutil.rmtree(run_dir)
    return {
        "arm": arm._asdict(),
        "suspected": [line["step"] for line in lines if line["event"] == "suspected"],
        "spikes": [line["step"] for line in lines if line["event"] == "spike"],
        "sick_workers": [line["step"] for line in lines if line["event"] == "sick worker"],
        "to": [line["to"] for line in lines if "rolled back" in line["event"]],
        "loss": loss,
        "steps_lost": calls - arm.steps,
    }


def one_of(rank: int, arm: Arm, out: Path, port: int) -> None:
    """A rank of a run of several workers."""
    start(arm, Place(rank, arm.workers, rank, arm.workers), out, port)


def start(arm: Arm, place: Place, out: Path, port: int = 0) -> int:
    """Train with the arm's injection, in this process. How many steps it took."""
    real, real_roll_back = TorchEngine.train_step, Recovery.roll_back
    first = 0 if arm.workers > 1 or arm.steps == PREFIX else PREFIX
    calls, over = 0, False

    def roll_back(self: Recovery, step: int) -> bool:
        nonlocal over
        over = True  # the cause is gone with the roll-back: what is compared is what it leaves behind
        return real_roll_back(self, step)

    def train_step(self: TorchEngine, batch: torch.Tensor, lr: float) -> StepResult:
        nonlocal calls
        calls += 1
        step = first + calls
        if arm.injection == "rate" and AT <= step < AT + 10 and not over:
            lr *= 10
        if arm.injection == "growing" and step >= AT and not over:
            lr *= 1.1 ** (step - AT + 1)
        if arm.injection == "batches" and AT <= step < AT + 3 and not over:
            batch = torch.randint(3, 259, batch.shape)
        if arm.injection == "nan" and step == AT and place.rank == place.world - 1:
            hook = next(self.model.parameters()).register_hook(lambda gradient: gradient * math.nan)
            result = real(self, batch, lr)
            hook.remove()
            return result
        return real(self, batch, lr)

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(place.rank), "WORLD_SIZE": str(place.world)}
    os.environ.update(where)
    TorchEngine.train_step, Recovery.roll_back = train_step, roll_back
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            train(toml.validate(table(arm, out / arm.name)), place, ["benchmark"])
    finally:
        TorchEngine.train_step, Recovery.roll_back = real, real_roll_back
    return calls


def main() -> None:
    options = parser(__doc__, seeds=5).parse_args()
    report = Report("recovery", options)
    steps, watched, count = (260, 260, 1) if options.small else (300, 1000, options.seeds)
    seeds = range(FIRST_SEED, FIRST_SEED + count)
    clean = [Arm("", 1, "rollback", seed, length) for seed in seeds for length in sorted({steps, watched})]
    arms = [
        Arm(injection, merge_last, optimizer, seed, steps)
        for seed in seeds
        for injection, ways in WAYS.items()
        for merge_last, optimizer in ways
    ]
    pairs = [Arm(injection, 1, "rollback", seed, steps, workers=2) for seed in seeds[:2] for injection in ("", "nan")]
    open_corpus(toml.validate(table(arms[0], report.out)).data)  # fills the cache once
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(prepare, seeds, [report.out] * count))
        results = list(pool.map(measure, [*clean, *arms], [report.out] * (len(clean) + len(arms))))
    judge(report, results[: len(clean)], results[len(clean) :], steps)
    judge_pairs(report, [measure(arm, report.out) for arm in pairs])
    report.finish()


def judge(report: Report, clean: list[dict[str, Any]], sick: list[dict[str, Any]], steps: int) -> None:
    """Detection, and each way to go on against the clean run of its seed."""
    wanted = {result["arm"]["seed"]: result["loss"] for result in clean if result["arm"]["steps"] == steps}
    found = [(result, min([s for s in result["suspected"] + result["spikes"] if s >= AT], default=None)) for result in sick]
    delays = {
        growing: [
            step - AT for result, step in found if step is not None and (result["arm"]["injection"] == "growing") == growing
        ]
        for growing in (False, True)
    }
    lasting = [result for result in sick if result["arm"]["injection"] in ("nan", "growing")]
    rows: dict[str, Any] = {}
    for result in sick:
        arm = result["arm"]
        row = rows.setdefault(f"{arm['injection']} merge {arm['merge_last']} {arm['optimizer']}", {"excess": [], "lost": []})
        row["excess"].append(result["loss"] - wanted[arm["seed"]])
        row["lost"].append(result["steps_lost"])
    for name, row in rows.items():
        row |= {"mean_excess": statistics.mean(row["excess"]), "steps_lost": statistics.mean(row["lost"])}
        report.say(f"{name:<26} loss above the clean run's {row['mean_excess']:+.4f}, steps lost {row['steps_lost']:.0f}")
    report.data |= {"clean": clean, "results": sick, "table": rows, "delays": spread([*map(float, delays[False])])}
    report.data["steps until a growing rate was detected"] = spread([*map(float, delays[True])])
    report.data["merge_gain"] = {}
    for injection, ways in WAYS.items():
        for optimizer in [optimizer for count, optimizer in ways if count == 3 and (1, optimizer) in ways]:
            one, three = (rows[f"{injection} merge {count} {optimizer}"]["excess"] for count in (1, 3))
            gains = [plain - merged for plain, merged in zip(one, three, strict=True)]
            error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
            gain = {"mean": statistics.mean(gains), "standard_error": error, "wins": sum(gain > 0 for gain in gains)}
            report.data["merge_gain"][f"{injection} {optimizer}"] = gain
            report.say(f"{injection} {optimizer}: merging three lowers the loss by {gain['mean']:+.4f} +- {error:.4f}")
    report.data["steps_until_it_went_back"] = {
        injection: spread([float(r["spikes"][0] - AT) for r in lasting if r["arm"]["injection"] == injection and r["spikes"]])
        for injection in ("nan", "growing")
    }
    report.bar("injections that were missed", sum(step is None for _, step in found), "<=", 0)
    report.bar("injections that do not heal and were not gone back from", sum(not r["spikes"] for r in lasting), "<=", 0)
    report.bar("steps until the last injection was detected", max(delays[False], default=math.inf), "<=", 5)
    # A rate that grows by a tenth a step does no harm at first: it is held to the bar of a ramp of the loss.
    report.bar("steps until the last growing rate was detected", max(delays[True], default=math.inf), "<=", 60)
    report.bar("alarms in clean runs", sum(len(result["spikes"]) for result in clean), "<=", 0)


def judge_pairs(report: Report, pairs: list[dict[str, Any]]) -> None:
    """A NaN gradient on one of two workers: found at the next merge, and the run does not go back."""
    clean, sick = pairs[::2], pairs[1::2]
    excess = [b["loss"] - a["loss"] for a, b in zip(clean, sick, strict=True)]
    report.data["one_of_two_workers"] = {"results": pairs, "excess": excess}
    report.say(f"NaN on one of two workers: loss above the clean run's {statistics.mean(excess):+.4f}, no steps lost")
    found = sum(result["sick_workers"] != [] and not result["spikes"] for result in sick)
    report.bar("sick workers of two that were found, with no roll-back", found, ">=", len(sick))


if __name__ == "__main__":
    main()
