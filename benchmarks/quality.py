"""The loss that merging costs: DiLoCo workers against data parallelism, at the same tokens and global batch.

Each arm is a real ``distmerge train`` run of a byte-level Llama of 0.26M parameters, and a row of a table: more arms are
more rows. First a sweep on a seed of its own tunes each side: data parallelism its learning rate, DiLoCo its inner and outer
rates and its momentum. The best of each are then judged on other seeds.

    python benchmarks/quality.py [--small] [--seeds N] [--out DIR] [--record] [--files GLOB ...]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w
from report import RECORDS, Report, parser

SEQUENCE_LENGTH = 128
GLOBAL_BATCH = 8  # sequences per step, over all ranks
EVAL_SEQUENCES = 1024
SWEEP_SEED = 100  # the bars are judged on seeds 0, 1, ...
EVERY = 20  # inner steps between merges


class Outer(NamedTuple):
    """What is tuned in DiLoCo."""

    inner_lr: float
    lr: float
    momentum: float

    def __str__(self) -> str:
        return f"inner {self.inner_lr:g}, outer {self.lr:g}/{self.momentum:g}"

    def arm(self, steps: int) -> Arm:
        return diloco(self.inner_lr, steps, self.lr, self.momentum)


class Size(NamedTuple):
    """Steps of the arms that are judged and of the sweep's, and what is swept, for each side its own."""

    steps: int
    sweep_steps: int
    data_parallel: tuple[float, ...]
    diloco: tuple[Outer, ...]


FULL = Size(
    steps=3000,
    sweep_steps=2000,
    data_parallel=(1e-3, 2e-3, 4e-3),
    diloco=(
        Outer(1e-3, 1.0, 0.0),
        Outer(1e-3, 0.7, 0.5),
        Outer(1e-3, 0.5, 0.8),
        Outer(1e-3, 0.7, 0.9),
        Outer(2e-3, 1.0, 0.0),
        Outer(2e-3, 0.7, 0.5),
    ),
)
SMALL = Size(steps=200, sweep_steps=100, data_parallel=(2e-3,), diloco=(Outer(1e-3, 0.7, 0.5), Outer(2e-3, 1.0, 0.0)))

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
            "evaluate": {"every": max(EVERY, min(200, self.steps // 5)), "batches": EVAL_SEQUENCES // batch_size},
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
        """The directory of the finished run. The trainer itself resumes one, or finds it finished."""
        run_dir, path, log_path = (self.report.out / (name + suffix) for suffix in ("", ".toml", ".log"))
        path.write_text(tomli_w.dumps(arm.config(seed, run_dir, self.files)))
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


def sweep(runs: Runs, size: Size) -> tuple[float, Outer]:
    """The best learning rate of data parallelism; the best rates and momentum of DiLoCo."""
    seeds, steps = [SWEEP_SEED], size.sweep_steps
    by_rate = {rate: runs.outcome(data_parallel(rate, steps), seeds).loss for rate in size.data_parallel}
    by_outer = {tuned: runs.outcome(tuned.arm(steps), seeds).loss for tuned in size.diloco}
    rate, tuned = min(by_rate, key=by_rate.__getitem__), min(by_outer, key=by_outer.__getitem__)
    runs.report.data["sweep"] = {
        "seed": SWEEP_SEED,
        "steps": steps,
        "rounds": steps // EVERY,
        "data parallelism": {f"{lr:g}": loss for lr, loss in by_rate.items()},
        "diloco": {str(settings): {"loss": loss, "gap": loss / by_rate[rate] - 1} for settings, loss in by_outer.items()},
        "best": {"data parallelism": rate, "diloco": str(tuned)},
    }
    return rate, tuned


def gap(arm: Outcome, baseline: Outcome) -> float:
    """How much higher the arm's mean loss is, as a share of the baseline's."""
    return arm.loss / baseline.loss - 1


def gap_on_the_way(arm: Outcome, baseline: Outcome) -> dict[int, float]:
    theirs = baseline.curve()
    return {step: loss / theirs[step] - 1 for step, loss in arm.curve().items() if step in theirs}


def plot(report: Report, baseline: Outcome, arms: dict[str, Outcome]) -> None:
    """Loss against tokens for each arm, and the gap to the baseline against rounds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for name, outcome in ({"data parallelism": baseline} | arms).items():
        points = {step: loss for step, loss in outcome.curve().items() if step}
        left.plot([step * GLOBAL_BATCH * SEQUENCE_LENGTH for step in points], list(points.values()), marker=".", label=name)
    for name, outcome in arms.items():
        points = {step: 100 * share for step, share in gap_on_the_way(outcome, baseline).items() if step}
        right.plot([step / EVERY for step in points], list(points.values()), marker=".", label=name)
    left.set(xlabel="tokens", ylabel="held-out loss, nats per byte")
    right.set(xlabel=f"rounds of {EVERY} steps", ylabel="gap to data parallelism, %")
    right.axhline(0, color="gray", linewidth=0.5)
    left.legend()
    right.legend()
    figure.tight_layout()
    for folder in (report.out, *([RECORDS] if report.recording else [])):
        figure.savefig(folder / "quality.png", dpi=100)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--files", nargs="+", default=[], metavar="GLOB", help="other text than the standard library's")
    options = arguments.parse_args()
    report, size = Report("quality", options), SMALL if options.small else FULL
    runs, seeds = Runs(report, options.files), list(range(options.seeds))
    lr, tuned = sweep(runs, size)
    baseline = runs.outcome(data_parallel(lr, size.steps), seeds)
    arms = {f"DiLoCo, 2 workers, {tuned}": runs.outcome(tuned.arm(size.steps), seeds)}
    two_workers = next(iter(arms.values()))
    report.data |= {
        "model": MODEL,
        "tokens": size.steps * GLOBAL_BATCH * SEQUENCE_LENGTH,
        "rounds": size.steps // EVERY,
        "losses": {name: outcome.losses for name, outcome in runs.outcomes.items()},
        "training_seconds": round(sum(sum(outcome.seconds) for outcome in runs.outcomes.values())),
        "gap": {name: gap(outcome, baseline) for name, outcome in arms.items()},
        "gap_on_the_way": {name: gap_on_the_way(outcome, baseline) for name, outcome in arms.items()},
    }
    claim = "two DiLoCo workers end within 2% of data parallelism's loss, relative gap of the mean over seeds"
    report.bar(claim, gap(two_workers, baseline), "<=", 0.02, quality=True)
    plot(report, baseline, arms)
    report.finish()


if __name__ == "__main__":
    main()
