"""The wire's formats: bytes that leave a rank, the reduction's error, and what 4 bits cost a short training run.

python benchmarks/wire.py [--small] [--seeds N] [--out DIR] [--record] [--files GLOB ...]
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from arms import Arm, Runs, diloco
from ranks import on_ranks
from report import Report, parser, spread

from distmerge.workers.flight import AllReduce, Exchange
from distmerge.workers.total import Peers
from distmerge.workers.wire import WIRES

NUMEL = 3_000_001
LR = 2e-3
STEPS = 600
"""Inner steps of the training runs: 30 rounds."""


def measure(rank: int) -> dict[str, Any]:
    """Bytes sent and the relative error of one mean of random deltas, by format."""
    torch.manual_seed(rank)
    own = torch.randn(NUMEL) * torch.rand(NUMEL).pow(4)  # deltas have heavy tails
    exact = own.double()
    dist.all_reduce(exact)
    exact /= dist.get_world_size()
    results = {}
    for name, wire in WIRES.items():
        peers, message = Peers(), torch.cat([own, torch.zeros(1)])
        flight = AllReduce(peers, message, 1.0) if name == "fp32" else Exchange(peers, message, 1.0, wire)
        flight.finish()
        mean = (message[:-1] / message[-1]).double()
        results[name] = {
            "bytes_sent": peers.ledger.bytes_sent,
            "relative_error": ((mean - exact).norm() / exact.norm()).item(),
        }
    return results


def thin(arm: Arm, wire: str) -> Arm:
    """The arm with its first merger on another wire, with error feedback."""
    entry = arm.merge[0] | {"wire": wire, "error_feedback": True}
    return Arm(f"{arm.name}-{wire}", arm.lr, arm.steps, arm.workers, arm.ranks, (entry,))


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--files", nargs="+", default=[], metavar="GLOB", help="other text than the standard library")
    options = arguments.parse_args()
    report = Report("wire", options)
    for ranks in (2, 4):
        results = on_ranks(measure, ranks)[0]
        report.data[f"{ranks} ranks"] = results
        for name, limit in (("bf16", 0.5), ("int8", 0.27), ("int4", 0.15)):
            ratio = results[name]["bytes_sent"] / results["fp32"]["bytes_sent"]
            report.bar(f"bytes sent on {name} against fp32, {ranks} ranks", round(ratio, 4), "<=", limit)
    gap = None
    if not options.small:
        runs = Runs(report, options.files)
        plain = diloco(LR, STEPS, 1.0, 0.0)
        full, quantised = (runs.outcome(arm, list(range(options.seeds))) for arm in (plain, thin(plain, "int4")))
        gaps = [b / a - 1 for a, b in zip(full.losses, quantised.losses, strict=True)]
        report.data["training"] = {"fp32": full.losses, "int4": quantised.losses, "gaps": spread(gaps)}
        gap = sum(gaps) / len(gaps)
    report.bar("loss of int4 with error feedback above fp32's, relative", gap, "<=", 0.005, quality=True)
    report.finish()


if __name__ == "__main__":
    main()
