"""The wire's formats: bytes that leave a rank, the reduction's error, how long a merge takes on each beside float32's own, what
encoding costs beside a copy, how long a merge that overlaps with training stops it, and what 4 bits cost a short training run.

python benchmarks/wire.py [--small] [--seeds N] [--out DIR] [--record] [--files GLOB ...]
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from arms import Arm, Runs, diloco
from exposed import judge_exposed
from ranks import on_ranks
from report import Report, parser, spread
from sync import Vector, drift, timed
from torch import nn

import distmerge as dm
from distmerge.workers.codec import Row
from distmerge.workers.exchange import Exchange
from distmerge.workers.group import WorkerGroup
from distmerge.workers.pending import AllReduce
from distmerge.workers.wire import WIRES

NUMEL = 3_000_001
LR = 2e-3
STEPS = 600
"""Inner steps of the training runs: 30 rounds."""

MERGED_NUMEL = 10_900_000
CODED_NUMEL = 1 << 23

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"wire": "bf16"},
    "int8": {"wire": "int8"},
    "int4 with error feedback": {"wire": "int4", "error_feedback": True},
    "sharded outer state": {"outer_sharded": True},
    "rule ties": {"rule": "ties", "density": 0.2},
}
"""How a merge may travel. All take the same outer step."""


def measure(rank: int) -> dict[str, Any]:
    """Bytes sent and the relative error of one mean of random deltas, by format."""
    torch.manual_seed(rank)
    own = torch.randn(NUMEL) * torch.rand(NUMEL).pow(4)  # deltas have heavy tails
    exact = own.double()
    dist.all_reduce(exact)
    exact /= dist.get_world_size()
    results = {}
    for name, wire in WIRES.items():
        peers, message = WorkerGroup(), torch.cat([own, torch.zeros(1)])
        flight = AllReduce(peers, message, 1.0) if name == "fp32" else Exchange(peers, message, 1.0, wire)
        flight.finish()
        mean = (message[:-1] / message[-1]).double()
        results[name] = {
            "bytes_sent": peers.ledger.bytes_sent,
            "relative_error": ((mean - exact).norm() / exact.norm()).item(),
        }
    return results


def merge_seconds(rank: int, repetitions: int) -> dict[str, list[float]]:
    """Seconds of a merge of each form, in turns, so that what else runs on the machine slows them alike."""
    torch.manual_seed(rank)
    mergers = {name: dm.DiLoCo(Vector(MERGED_NUMEL, "cpu"), every=1, **keys) for name, keys in FORMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in FORMS}
    for repetition in range(repetitions + 1):
        for name, merger in mergers.items():
            drift(merger.flat.vector)
            turn = timed(merger.merge, "cpu")
            if repetition:  # the first one touches the memory for the first time
                seconds[name].append(turn)
    return seconds


class Layers(nn.Module):
    """The parameters of a transformer of 12 layers and 30M parameters, by name and shape."""

    def __init__(self, width: int = 384, vocabulary: int = 11_000):
        super().__init__()
        shapes = {"embed_tokens": (vocabulary, width), "lm_head": (vocabulary, width), "norm": (width,)}
        for layer in range(12):
            own = {"attn": (4 * width, width), "up": (4 * width, width), "down": (width, 4 * width), "norm": (width,)}
            shapes |= {f"layers_{layer}_{name}": shape for name, shape in own.items()}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def bytes_by_rule(rank: int) -> dict[str, float]:
    """What this rank sends in one merge of 30M parameters, by rule."""
    found = {}
    rules: dict[str, dict[str, Any]] = {"mean": {}, "ties": {"density": 0.2}}
    for rule, given in rules.items():
        merger = dm.DiLoCo(Layers(), every=1, rule=rule, **given)
        torch.manual_seed(rank)
        drift(merger.flat.vector)
        found[rule] = merger.merge().bytes_sent
    return found


def judge_bytes(report: Report) -> None:
    """The exchange of a rule sends what the mean's all-reduce sends; tallies, weights and padding are counted."""
    for ranks in (2, 4, 8):
        results = on_ranks(bytes_by_rule, ranks)
        most = max(result["ties"] / result["mean"] for result in results)
        report.data[f"bytes of a merge of 30M parameters, {ranks} ranks"] = results
        report.bar(f"bytes that ties sends over the mean's, 30M parameters, the worst of {ranks} ranks", most, "<=", 1.02)


def codec_ratios(repetitions: int) -> dict[str, list[float]]:
    """Seconds of encoding and decoding over those of a copy of the floats, on one core, in turns."""
    values, target = torch.randn(CODED_NUMEL), torch.empty(CODED_NUMEL)
    ratios: dict[str, list[float]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for repetition in range(repetitions + 1):
        copy = clocked(lambda: target.copy_(values))
        for name in ("bf16", "int8", "int4"):
            wire = WIRES[name]
            row = Row(wire, torch.empty(wire.size_bytes(CODED_NUMEL), dtype=torch.uint8), CODED_NUMEL)
            row.encode(values)  # touches the memory
            for verb, work in (("encode", lambda row=row: row.encode(values)), ("decode", lambda row=row: row.decode(target))):
                ratio = clocked(work) / copy
                if repetition:
                    ratios.setdefault(f"{name} {verb}", []).append(ratio)
    torch.set_num_threads(threads)
    return ratios


def clocked(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def judge_speed(report: Report, repetitions: int) -> None:
    results = on_ranks(merge_seconds, 2, repetitions)
    slowest = {name: [max(turn) for turn in zip(*(r[name] for r in results), strict=True)] for name in FORMS}
    plain = slowest["fp32"]
    ratios = {
        name: spread([a / b for a, b in zip(values, plain, strict=True)]) for name, values in slowest.items() if name != "fp32"
    }
    report.data["merge, 2 ranks"] = {"seconds": {name: spread(v) for name, v in slowest.items()}, "over fp32": ratios}
    for name, limit in (("int8", 1.5), ("int4 with error feedback", 2.0), ("sharded outer state", 1.15), ("rule ties", 2.5)):
        report.bar(f"a merge of 10.9M parameters over fp32's, 2 ranks, {name}", ratios[name]["median"], "<=", limit)
    codec = {name: spread(values) for name, values in codec_ratios(repetitions).items()}
    report.data["over a copy, one core"] = codec
    for name, found in codec.items():
        report.bar(f"{name} over a copy of the floats, one core", found["median"], "<=", 3.0)


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
    judge_bytes(report)
    judge_speed(report, 7 if options.small else 21)
    judge_exposed(report, 3 if options.small else 15)
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
