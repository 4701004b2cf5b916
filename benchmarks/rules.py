"""Which rule merges workers best: the final loss by rule, at the same bytes, clean and with a worker whose data goes bad.

M workers train a transformer of 0.4M parameters over bytes and merge every 4 steps, 100 times. They are rows of one stack in
one process, and a merge runs the catalogue's rule on their deltas, tensor by tensor, as the owners of an exchange do
(tests/workers/test_rules.py holds the two to the same bits). Every other worker has half a batch, so that token weights say
something. In the second half of the arms worker 0 gets random bytes in a tenth of the rounds, drawn by seed. Beside each loss
stands the mean correlation of the deltas.

    python benchmarks/rules.py [--small] [--seeds N] [--out DIR] [--record]

Finished runs lie in OUT/rules/ and are not run again.
"""

from __future__ import annotations

import itertools
import math
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import Report, parser, remembered
from tails import text
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm

from distmerge.config.presets import outer_of
from distmerge.rules import catalogue
from distmerge.rules.mean import token_weight
from distmerge.rules.outer import outer_step
from distmerge.rules.protocol import Target, run

EVERY, MERGES = 4, 100
WIDTH, DEPTH, HEADS, LENGTH, BATCH = 104, 4, 4, 32, 4
RATE = 2e-3
HELD_OUT = 256  # sequences
BAD = 0.1
"""Share of the rounds in which worker 0's data is random bytes."""

RULES: dict[str, dict[str, float]] = {
    "mean": {},
    "tokens": {},
    "radial": {},
    "median": {},
    "trimmed-mean": {},
    "ties": {"density": 0.5},
    "dare": {"density": 0.8},
    "sce": {"select_topk": 0.5},
    "auto": {"density": 0.5},
}
AUTO_RULE, AUTO_ABOVE = "ties", 0.9
WORKERS = (2, 4, 8)


class Arm(NamedTuple):
    """One run."""

    rule: str
    workers: int
    bad: bool
    seed: int
    merges: int

    @property
    def name(self) -> str:
        return f"{self.rule}-{self.workers}{'-bad' if self.bad else ''}-seed{self.seed}-{self.merges}"


class Stack(nn.Module):
    """M transformers over bytes, the same at first, each parameter with a leading dimension of M."""

    def __init__(self, workers: int, seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        w = WIDTH
        shapes = {"embed": (256, w), "places": (LENGTH, w), "head": (w, 256), "norm": (w,)}
        for layer in range(DEPTH):
            own = {"norm1": (w,), "qkv": (w, 3 * w), "out": (w, w), "norm2": (w,), "up": (w, 2 * w), "down": (2 * w, w)}
            shapes |= {f"layer{layer}_{name}": shape for name, shape in own.items()}
        for name, shape in shapes.items():
            scale = 0.02 if name in ("embed", "places") else shape[0] ** -0.5
            value = torch.ones(shape) if "norm" in name else scale * torch.randn(shape, generator=draw)
            self.register_parameter(name, nn.Parameter(value.expand(workers, *shape).clone()))
        self.register_buffer("mask", torch.full((LENGTH, LENGTH), -math.inf).triu(1), persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """``[M, B]``: the mean loss of each row of ``rows [M, B, LENGTH + 1]``."""
        p = dict(self.named_parameters())
        workers, batch, _ = rows.shape
        index = torch.arange(workers).view(-1, 1, 1)
        x = (p["embed"][index, rows[..., :-1]] + p["places"][:, None]).view(workers, -1, WIDTH)
        for layer in range(DEPTH):
            own = {name: p[f"layer{layer}_{name}"] for name in ("norm1", "qkv", "out", "norm2", "up", "down")}
            x = x + self.attend(scaled(x, own["norm1"]) @ own["qkv"], workers, batch) @ own["out"]
            x = x + nn.functional.gelu(scaled(x, own["norm2"]) @ own["up"]) @ own["down"]
        logits = scaled(x, p["norm"]) @ p["head"]
        losses = cross_entropy(logits.view(-1, 256), rows[..., 1:].reshape(-1), reduction="none")
        return losses.view(workers, batch, LENGTH).mean(-1)

    def attend(self, qkv: Tensor, workers: int, batch: int) -> Tensor:
        q, k, v = qkv.view(workers * batch, LENGTH, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) * (WIDTH // HEADS) ** -0.5 + self.get_buffer("mask")).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(workers, batch * LENGTH, WIDTH)


def scaled(x: Tensor, gain: Tensor) -> Tensor:
    return layer_norm(x, (WIDTH,)) * gain[:, None]


def train(arm: Arm) -> dict[str, Any]:
    """One run: its final loss, and how alike the deltas were."""
    torch.set_num_threads(1)
    rows = text()
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    model = Stack(arm.workers, arm.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    anchors = {name: parameter.detach()[0].flatten().clone() for name, parameter in model.named_parameters()}
    velocities = {name: torch.zeros_like(anchor) for name, anchor in anchors.items()}
    draw = torch.Generator().manual_seed(1000 + arm.seed)
    counts = torch.tensor([BATCH // 2 if worker % 2 else BATCH for worker in range(arm.workers)])
    share = (torch.arange(BATCH) < counts[:, None]) / counts[:, None]
    correlations: list[float] = []
    for merge in range(arm.merges):
        bad = bool(torch.rand((), generator=draw) < BAD) and arm.bad
        for _ in range(EVERY):
            batch = rows[torch.randint(len(rows), (arm.workers, BATCH), generator=draw)]
            noise = torch.randint(256, batch.shape[1:], generator=draw)
            batch = torch.cat([noise[None], batch[1:]]) if bad else batch
            (model(batch) * share).sum().backward()
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
        correlations.append(merge_stack(arm, model, anchors, velocities, counts, merge))
    with torch.no_grad():
        first = Stack(1, 0)
        for name, parameter in first.named_parameters():
            parameter.copy_(anchors[name].view(parameter.shape))
        loss = first(held_out[None]).mean().item()
    return {"loss": loss, "correlation": statistics.mean(correlations)}


def clip(model: Stack) -> None:
    """Each worker's gradient to a norm of at most 1."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norms = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0).sqrt()
    factor = (1 / norms.clamp(min=1e-12)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))


@torch.no_grad()
def merge_stack(
    arm: Arm, model: Stack, anchors: dict[str, Tensor], velocities: dict[str, Tensor], counts: Tensor, merge: int
) -> float:
    """One merge of all workers; the mean correlation of their deltas."""
    outer = outer_of(arm.workers)
    deltas = {name: parameter.flatten(1) - anchors[name] for name, parameter in model.named_parameters()}
    alike = correlation(deltas)
    rule = arm.rule if arm.rule != "auto" else "mean" if alike > AUTO_ABOVE else AUTO_RULE
    tokens = [token_weight(float(count) * LENGTH * EVERY, EVERY) for count in counts.tolist()]
    weights = [one * len(tokens) / sum(tokens) for one in tokens] if rule == "tokens" else [1.0] * arm.workers
    given = RULES[arm.rule] if rule != "mean" else {}
    alike_each, shared = catalogue.spread(rule, arm.workers, given)
    each = tuple(own | {"weight": weight} for own, weight in zip(alike_each, weights, strict=True))
    for name, parameter in model.named_parameters():
        shape, embedding = tuple(parameter.shape[1:]), name in ("embed", "places", "head")
        target = Target(name, shape, each, shared, seed=arm.seed + (merge << 32), embedding=embedding)
        merged = run(catalogue.build(rule, target), list(deltas[name]))
        outer_step(anchors[name], merged, velocities[name], outer["outer_lr"], outer["outer_momentum"])
        parameter.copy_(anchors[name].view(shape).expand_as(parameter))
    return alike


def correlation(deltas: dict[str, Tensor]) -> float:
    """The mean cosine between two workers' deltas, as if of equal norms: what a merge reports."""
    own = sum(float(delta.square().sum()) for delta in deltas.values())
    whole = sum(float(delta.sum(0).square().sum()) for delta in deltas.values())
    workers = len(next(iter(deltas.values())))
    return (whole / own - 1) / (workers - 1)


def finished(arm: Arm, out: Path) -> dict[str, Any]:
    return remembered(out / f"{arm.name}.json", arm._asdict(), lambda: train(arm))


def main() -> None:
    options = parser(__doc__, seeds=2).parse_args()
    report = Report("rules", options)
    workers, merges = ((2,), 10) if options.small else (WORKERS, MERGES)
    arms = [
        Arm(rule, count, bad, seed, merges)
        for count, seed, bad, rule in itertools.product(workers, range(options.seeds), (False, True), RULES)
    ]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(finished, arms, [report.out] * len(arms)))
    parameters = sum(parameter[0].numel() for parameter in Stack(1, 0).parameters())
    report.data |= {"parameters": parameters, "merges": merges, "every": EVERY, "tables": tables(report, arms, results)}
    report.bar("runs whose loss is not finite", sum(not math.isfinite(result["loss"]) for result in results), "<=", 0)
    report.finish()


def tables(report: Report, arms: list[Arm], results: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean losses over the seeds, and each rule's paired difference to the mean."""
    by_arm = dict(zip(arms, results, strict=True))
    found: dict[str, Any] = {}
    for bad, count in itertools.product((False, True), sorted({arm.workers for arm in arms})):
        title = f"{count} workers, {'one of them bad in a tenth of the rounds' if bad else 'clean'}"
        report.say(title)
        rows: dict[str, Any] = {}
        for rule in RULES:
            own = [arm for arm in arms if (arm.rule, arm.workers, arm.bad) == (rule, count, bad)]
            losses = [by_arm[arm]["loss"] for arm in own]
            gaps = [by_arm[arm]["loss"] - by_arm[arm._replace(rule="mean")]["loss"] for arm in own]
            rows[rule] = {
                "losses": losses,
                "over_the_mean": statistics.mean(gaps),
                "correlation": statistics.mean(by_arm[arm]["correlation"] for arm in own),
            }
            report.say(
                f"  {rule:<14} {statistics.mean(losses):.4f}  {rows[rule]['over_the_mean']:+.4f}  "
                f"correlation {rows[rule]['correlation']:.2f}"
            )
        found[title] = rows
    return found


if __name__ == "__main__":
    main()
