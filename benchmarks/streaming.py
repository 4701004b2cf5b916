"""What streaming costs: the final loss of DiLoCo with each option of Streaming DiLoCo added, and with it taken from the preset.

Two real workers train a transformer of 0.4M parameters over bytes for 2,000 steps and merge every 20, as a run of that length
does by default. All arms of a seed start from the same parameters and draw the same batches; the final models are judged on the
same held-out rows. The inner rate has a warm-up of 5% and a linear decay over the last quarter.

A cost is a relative difference of final losses, paired by seed, and its standard error is taken over the seeds.

    python benchmarks/streaming.py [--small] [--seeds N] [--kept] [--out DIR] [--record]

Finished runs lie in OUT/streaming/ and are not run again; arms of the same settings share a run. ``--kept`` runs nothing, and
tells what the runs that are there say: an arm counts with the seeds it has, from 0 on.
"""

from __future__ import annotations

import json
import math
import statistics
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from report import Report, parser, remembered
from tails import ByteModel, text
from torch import Tensor, nn

import distmerge as dm
from distmerge.config.presets import every_of, outer_of

WORKERS, STEPS, SMALL_STEPS = 2, 2000, 60
WIDTH, DEPTH, BATCH = 104, 4, 4
RATE = 2e-3
HELD_OUT = 1024  # sequences of 32 bytes
PATIENCE = timedelta(hours=6)
"""How long a collective waits: a run may be stopped for a while and go on."""

DEFAULT: dict[str, Any] = outer_of(WORKERS)
PAPER: dict[str, Any] = {"outer_lr": 0.4, "outer_momentum": 0.9}
FRAGMENTS: dict[str, Any] = {"fragments": 4}
OVERLAP = FRAGMENTS | {"overlap": 1}
MIX = OVERLAP | {"mix": 0.5}
INT4: dict[str, Any] = {"wire": "int4", "error_feedback": True}
STREAMING = MIX | INT4

REFERENCE, PRESET = "DiLoCo", "streaming preset"
ARMS: dict[str, dict[str, Any]] = {
    REFERENCE: DEFAULT,
    PRESET: DEFAULT | dm.PRESETS["streaming-diloco"],
    "all, paper's outer": PAPER | STREAMING,
    "all, mix 0": DEFAULT | STREAMING | {"mix": 0.0},
    "fragments, overlap 1": DEFAULT | OVERLAP,
    "all": DEFAULT | STREAMING,
    "all, momentum 0.7": DEFAULT | STREAMING | {"outer_momentum": 0.7},
    "int4 with error feedback": DEFAULT | INT4,
    "int4 without error feedback": DEFAULT | {"wire": "int4"},
    "int8": DEFAULT | {"wire": "int8"},
    "fragments": DEFAULT | FRAGMENTS,
    "fragments, overlap 4": DEFAULT | OVERLAP | {"overlap": 4},
    "fragments, overlap 1, mix 0.5": DEFAULT | MIX,
    "paper's outer": PAPER,
    "all, paper's outer, fp32": PAPER | MIX,
}
CORE = (REFERENCE, PRESET, "all, paper's outer", "all, mix 0")
"""The arms that say whether the preset is right and what it should be: these run first, on all seeds."""
SMALL_ARMS = (REFERENCE, PRESET, "int4 without error feedback")

OPTIONS: dict[str, tuple[str, str]] = {
    "fragments": ("fragments", REFERENCE),
    "overlap of 1": ("fragments, overlap 1", "fragments"),
    "overlap of 4": ("fragments, overlap 4", "fragments"),
    "mix of 0.5": ("fragments, overlap 1, mix 0.5", "fragments, overlap 1"),
    "mix of 0.5, among all": ("all", "all, mix 0"),
    "mix of 0.5 with outer momentum 0.7, among all": ("all, momentum 0.7", "all, mix 0"),
    "int8": ("int8", REFERENCE),
    "int4 with error feedback": ("int4 with error feedback", REFERENCE),
    "int4 with error feedback, among all": ("all", "fragments, overlap 1, mix 0.5"),
    "int4 with error feedback, among all without mix": ("all, mix 0", "fragments, overlap 1"),
    "int4 with error feedback, among all with the paper's outer": ("all, paper's outer", "all, paper's outer, fp32"),
    "int4 without error feedback": ("int4 without error feedback", REFERENCE),
    "paper's outer": ("paper's outer", REFERENCE),
    "paper's outer, among all": ("all, paper's outer", "all"),
}
"""What each option costs: an arm with it and one without."""


def rate_at(step: int, steps: int) -> float:
    """The share of the inner rate at a step from 0: up over 5%, constant, and down to 0 over the last quarter."""
    return min(1.0, (step + 1) / (0.05 * steps), (steps - step) / (0.25 * steps))


def train_all(rank: int, seed: int, steps: int, runs: list[tuple[str, dict[str, Any]]]) -> None:
    """Make runs one after the other, each given by the path of its file and its settings."""
    rows = text()
    group: Any = dist.new_group(timeout=PATIENCE)
    for path, settings in runs:
        result = train(rank, seed, steps, settings, rows, group)
        if rank == 0:
            remembered(Path(path), key_of(seed, steps, settings), lambda result=result: result)


def train(rank: int, seed: int, steps: int, settings: dict[str, Any], rows: Tensor, group: dist.ProcessGroup) -> dict[str, Any]:
    """One run of one worker: the held-out loss of the final model in nats a byte, and the bytes that this worker sent."""
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    torch.manual_seed(seed)
    model = ByteModel(WIDTH, DEPTH)
    merger = dm.DiLoCo(model, every=every_of(steps), group=group, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, steps))
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    for _ in range(steps):
        model(rows[torch.randint(len(rows), (BATCH,), generator=draw)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        merger.step()
    sent = merger.bytes_sent
    merger.finish()
    with torch.no_grad():
        loss = statistics.mean(model(part).item() for part in held_out.split(128))
    return {"loss": loss, "bytes_sent": sent, "parameters": sum(p.numel() for p in model.parameters())}


def key_of(seed: int, steps: int, settings: dict[str, Any]) -> dict[str, Any]:
    return {"settings": settings, "seed": seed, "steps": steps}


def finished(report: Report, seed: int, steps: int, arms: dict[str, dict[str, Any]], kept: bool) -> dict[str, Any]:
    """The first worker's results of each arm; what is missing is run, or left out with ``kept``."""
    paths = {
        name: report.out / f"{'-'.join(f'{key}={settings[key]}' for key in sorted(settings))}-seed{seed}-{steps}.json"
        for name, settings in arms.items()
    }
    missing = {str(path): arms[name] for name, path in paths.items() if not path.exists()}
    if missing and not kept:
        on_ranks(train_all, WORKERS, seed, steps, list(missing.items()))
    found = {name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}
    for name, run in found.items():
        assert run["key"] == key_of(seed, steps, arms[name]), f"{paths[name]} is of another run: remove it"
        report.say(f"seed {seed}, {name}: {run['loss']:.4f}")
    return found


def cost(losses: dict[str, list[float]], arm: str, base: str) -> dict[str, Any]:
    """How much higher the losses of one arm are than those of another, in percent, paired by seed, where both ran."""
    paired = [100 * (own / other - 1) for own, other in zip(losses[arm], losses[base], strict=False)]
    error = statistics.stdev(paired) / math.sqrt(len(paired)) if len(paired) > 1 else None
    return {"percent": statistics.mean(paired), "standard_error": error, "by_seed": paired}


def shown(found: dict[str, Any]) -> str:
    error = found["standard_error"]
    return f"{found['percent']:+.2f}%" + ("" if error is None else f" +- {error:.2f}")


def main() -> None:
    arguments = parser(__doc__, seeds=3)
    arguments.add_argument("--kept", action="store_true", help="run nothing, and take the runs that are there")
    options = arguments.parse_args()
    report = Report("streaming", options)
    steps = SMALL_STEPS if options.small else STEPS
    arms = {name: settings for name, settings in ARMS.items() if not options.small or name in SMALL_ARMS}
    core = {name: settings for name, settings in arms.items() if name in CORE}
    others = {name: settings for name, settings in arms.items() if name not in CORE}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for part in (core, others):
        for seed in range(options.seeds):
            for name, run in finished(report, seed, steps, part, options.kept).items():
                results[name].append(run)
    losses = {name: [run["loss"] for run in runs] for name, runs in results.items() if runs}
    table = {name: row(arms[name], results[name], cost(losses, name, REFERENCE)) for name in losses}
    costs = {name: cost(losses, *pair) for name, pair in OPTIONS.items() if set(pair) <= set(losses)}
    report.data |= {
        "workers": WORKERS, "steps": steps, "every": every_of(steps), "batch": BATCH, "held_out_rows": HELD_OUT,
        "parameters": results[REFERENCE][0]["parameters"], "arms": table, "options": costs,
        "revisions": sorted({str(run["revision"]) for runs in results.values() for run in runs}),
    }  # fmt: skip
    for title, entries in {"over DiLoCo": table, "of one option": costs}.items():
        report.say(f"cost {title}")
        for name, found in entries.items():
            report.say(f"  {name:<60} {shown(found)}")
    report.bar("cost of the streaming preset over DiLoCo in percent", table[PRESET]["percent"], "<=", 0.5, quality=True)
    report.bar("runs whose loss is not finite", sum(not math.isfinite(x) for row in losses.values() for x in row), "<=", 0)
    report.finish()


def row(settings: dict[str, Any], runs: list[dict[str, Any]], over: dict[str, Any]) -> dict[str, Any]:
    """An arm in the table."""
    losses = [run["loss"] for run in runs]
    return {"settings": settings, "losses": losses, "loss": statistics.mean(losses), "bytes_sent": runs[0]["bytes_sent"]} | over


if __name__ == "__main__":
    main()
