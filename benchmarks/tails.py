"""What ``finish()`` makes of a round that was begun: the loss of the final model at every length of the tail.

Workers merge every 30 steps and stop after 240 + t steps, for t of 0 to 29. One run serves all: at each step from 240 on
the parameters and the merger's state are set aside, the run is finished as a user's loop finishes it, the model is judged on
held-out text, and the run goes on from what was set aside. Beside ``finish()`` stand what it could have been:

    anchor      what the workers shared last
    mean        the plain mean of the workers
    outer step  one more outer step along the mean delta, as after a whole round
    scaled      the same, its momentum scaled by steps / H

A tail must not make the model worse than the better of the anchor and the mean, whichever that is on the held-out text.

    python benchmarks/tails.py [--small] [--seeds N] [--out DIR] [--record]
"""

from __future__ import annotations

import copy
import math
import statistics
import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from report import Report, parser, remembered
from torch import Tensor, nn

import distmerge as dm

EVERY = 30
ROUNDS = 8  # whole rounds before the tail
LENGTH = 32
BATCH = 8
HELD_OUT = 256  # sequences
RATE = 2e-3

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {"outer_lr": 0.7, "outer_momentum": 0.5},
    "streaming": dm.PRESETS["streaming-diloco"],
}


class ByteModel(nn.Module):
    """A causal transformer over bytes of 0.06M parameters; the mean loss of a batch ``[rows, LENGTH + 1]``."""

    def __init__(self, width: int = 48, depth: int = 4):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Parameter(0.02 * torch.randn(LENGTH, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.bytes(rows[:, :-1]) + self.places
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), rows[:, 1:].flatten())


def text() -> Tensor:
    """``[rows, LENGTH + 1]``: the source of some of the standard library's modules, shuffled."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
    rows = rows[: len(rows) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def mean_over_workers(x: Tensor) -> Tensor:
    summed = x.clone()
    dist.all_reduce(summed)
    return summed / dist.get_world_size()


@torch.no_grad()
def candidates(merger: dm.DiLoCo) -> dict[str, Tensor]:
    """What the final model could be at this step, in the layout of the flat vector; the merger is left as it is."""
    theta, own = merger.flat.vector, merger.flat.vector.clone()
    state = copy.deepcopy(merger.state_dict())
    assert merger.outer is not None and merger.outer.velocity is not None
    anchor, velocity = merger.outer.anchor.clone(), merger.outer.velocity.clone()
    mean = mean_over_workers(own)
    lr, momentum, delta = merger.outer.lr, merger.outer.momentum, mean - anchor
    share = torch.zeros_like(theta)
    for number, fragment in enumerate(merger.fragments):
        for part in (part for bucket in fragment for part in bucket.slices):
            share[part] = merger.progress.since_sent(number) / EVERY
    merger.finish()
    found = {
        "anchor": anchor,
        "mean": mean,
        "outer step": anchor + lr * (1 + momentum) * delta + lr * momentum**2 * velocity,
        "scaled": anchor + lr * (1 + momentum) * delta + lr * momentum**2 * share * velocity,
        "final": theta.clone(),
    }
    theta.copy_(own)
    merger.load_state_dict(state)
    return found


@torch.no_grad()
def losses(model: nn.Module, theta: Tensor, vectors: dict[str, Tensor], rows: Tensor) -> dict[str, float]:
    """The held-out loss of each vector; the workers judge some each."""
    own, mine = theta.clone(), {}
    for index, (name, vector) in enumerate(vectors.items()):
        if index % dist.get_world_size() == dist.get_rank():
            theta.copy_(vector)
            mine[name] = model(rows).item()
    theta.copy_(own)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine)
    return {name: loss for part in gathered for name, loss in part.items()}


def run(rank: int, seed: int, settings: dict[str, Any], tails: list[int]) -> dict[int, dict[str, float]]:
    """The losses at each tail, of one run."""
    rows = text()
    held_out, train = rows[:HELD_OUT], rows[HELD_OUT:]
    torch.manual_seed(seed)
    model = ByteModel()
    merger = dm.DiLoCo(model, every=EVERY, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    draw = torch.Generator().manual_seed(1000 * seed + rank)
    found: dict[int, dict[str, float]] = {}
    for step in range(1, ROUNDS * EVERY + max(tails) + 1):
        model(train[torch.randint(len(train), (BATCH,), generator=draw)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        merger.step()
        if step - ROUNDS * EVERY in tails:
            found[step - ROUNDS * EVERY] = losses(model, merger.flat.vector, candidates(merger), held_out)
    return found


def above(run: dict[int, dict[str, float]], name: str, tails: list[int]) -> list[float]:
    """How far a candidate's loss is above the better of anchor and mean, at each tail."""
    return [run[tail][name] - min(run[tail]["anchor"], run[tail]["mean"]) for tail in tails]


def in_errors(differences: list[float]) -> float:
    """The mean of paired differences in its standard errors; rounding (1e-5) is no difference."""
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return 0.0 if mean <= 1e-5 else mean / error if error else math.inf


def judge(report: Report, name: str, runs: list[dict[int, dict[str, float]]], tails: list[int]) -> None:
    over = {which: [above(run, which, tails) for run in runs] for which in ("anchor", "mean", "outer step", "scaled", "final")}
    by_tail = [in_errors([seed[index] for seed in over["final"]]) for index in range(len(tails))]
    report.data[name] = {
        "losses": {str(tail): [run[tail] for run in runs] for tail in tails},
        "above the better of anchor and mean, mean over tails and seeds": {
            which: statistics.mean(map(statistics.mean, seeds)) for which, seeds in over.items()
        },
        "final above it, in standard errors, by tail": dict(zip(map(str, tails), by_tail, strict=True)),
    }
    claim = f"final above the better of anchor and mean at the worst tail, in standard errors over seeds, {name}"
    report.bar(claim, max(by_tail), "<=", 2, quality=True)


def main() -> None:
    options = parser(__doc__, seeds=3).parse_args()
    report = Report("tails", options)
    tails = [0, 1, 15, 29] if options.small else list(range(EVERY))
    for name, settings in SETTINGS.items():
        runs = []
        for seed in range(options.seeds):
            key = {"name": name, "settings": settings, "seed": seed, "tails": tails}
            path = report.out / f"{name.replace('/', '-')}-seed{seed}.json"
            kept = remembered(
                path, key, lambda seed=seed, settings=settings: {"run": on_ranks(run, 2, seed, settings, tails)[0]}
            )
            runs.append({int(tail): losses for tail, losses in kept["run"].items()})
            report.say(f"{name}, seed {seed}: tail of 1: {runs[-1][1]}")
        judge(report, name, runs, tails)
    report.finish()


if __name__ == "__main__":
    main()
