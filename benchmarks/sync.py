"""One DiLoCo sync against its floor: a bare all-reduce of the same bytes, and the memory streams that it cannot avoid.

With theta, anchor and velocity in memory, a sync must read theta and the anchor and write the delta, and after the all-reduce
read the delta, read and write velocity and anchor, and write theta: 9 reads or writes of n floats. Each is charged at the
bandwidth of a plain copy (two streams), by all ranks at once. All three are measured in turns.

    python benchmarks/sync.py [--small] [--out DIR] [--record]
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from ranks import on_ranks
from report import Report, parser, spread
from torch import Tensor, nn

import distmerge as dm

NUMEL = 30_000_000
STREAMS = 9
BUCKET_BYTES = 64 * 2**20
LIMIT = 1.25


class Vector(nn.Module):
    """A model of one parameter, so that nothing but the sync itself is timed."""

    def __init__(self, numel: int, device: str):
        super().__init__()
        self.theta = nn.Parameter(torch.randn(numel, device=device))


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds from when all ranks are ready until this one is done."""
    dist.barrier()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(rank: int, repetitions: int, device: str) -> dict[str, list[float]]:
    """Seconds of each repetition, and the collectives of a merge, on one rank."""
    torch.manual_seed(rank)
    model = Vector(NUMEL, device)
    merger = dm.DiLoCo(model, every=1, bucket_bytes=BUCKET_BYTES)
    bare, source = torch.randn(NUMEL, device=device), torch.randn(NUMEL, device=device)
    target = torch.zeros_like(source)
    seconds: dict[str, list[float]] = {"all_reduce": [], "copy": [], "sync": []}
    collectives: set[int] = set()
    for repetition in range(repetitions + 1):
        drift(model.theta)
        bare.fill_(1.0)
        turn = {
            "all_reduce": timed(lambda: dist.all_reduce(bare), device),
            "copy": timed(lambda: target.copy_(source), device),
            "sync": timed(lambda: collectives.add(merger.merge().collectives), device),
        }
        if repetition:  # the first one touches the memory for the first time
            for name, value in turn.items():
                seconds[name].append(value)
    return seconds | {"collectives": [float(count) for count in sorted(collectives)]}


@torch.no_grad()
def drift(theta: Tensor) -> None:
    """A round of training, as far as a sync can tell."""
    theta.add_(
        torch.randn(1 << 16, device=theta.device).repeat(math.ceil(theta.numel() / (1 << 16)))[: theta.numel()], alpha=0.01
    )


def judge(report: Report, ranks: int, repetitions: int, device: str) -> None:
    results = on_ranks(measure, ranks, repetitions, device, backend="nccl" if device == "cuda" else "gloo")
    # All wait for the slowest rank.
    slowest = {
        name: [max(turn) for turn in zip(*(r[name] for r in results), strict=True)] for name in ("all_reduce", "copy", "sync")
    }
    floors = [bare + STREAMS / 2 * copy for bare, copy in zip(slowest["all_reduce"], slowest["copy"], strict=True)]
    # A turn's three measurements lie next to each other: what else runs on the machine slows them alike.
    ratios = spread([sync / floor for sync, floor in zip(slowest["sync"], floors, strict=True)])
    collectives, allowed = max(results[0]["collectives"]), math.ceil(4 * NUMEL / BUCKET_BYTES) + 1
    report.data[f"{ranks} ranks, {device}"] = {
        "seconds": {name: spread(values) for name, values in slowest.items()},
        "copy_bytes_per_second": 8 * NUMEL / spread(slowest["copy"])["median"],
        "floor_seconds": spread(floors),
        "ratio": ratios,
        "collectives": collectives,
    }
    where = f"{ranks} ranks" if device == "cpu" else f"{ranks} ranks on CUDA"
    report.bar(f"a DiLoCo sync of 30M parameters against its floor, {where}", ratios["median"], "<=", LIMIT)
    report.bar(f"collectives of a sync, {where}", collectives, "<=", allowed)


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("sync", options)
    repetitions = 7 if options.small else 21
    gpus = torch.cuda.device_count()
    for ranks in (2, 4):
        judge(report, ranks, repetitions, "cpu")
        if gpus >= ranks:
            judge(report, ranks, repetitions, "cuda")
    report.finish()


if __name__ == "__main__":
    main()
