"""The form that all benchmarks share: arguments, bars, the machine, a record, one JSON object as the last line.

    options = parser(__doc__).parse_args()
    report = Report("sync", options)
    report.data["ranks"] = ...
    report.bar("a sync takes at most 1.4x its floor", ratio, "<=", 1.4)
    report.finish()

A full run keeps its object in ``OUT/NAME.json``; with ``--record`` also in ``benchmarks/records/NAME.json``, with the commit
and the command. Bars on quality are judged at full size only: ``--small`` repeats the recorded ones.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from distmerge.rundir.layout import git_revision, write_atomically

HERE = Path(__file__).parent
RECORDS = HERE / "records"


def parser(doc: str | None, seeds: int = 2) -> argparse.ArgumentParser:
    """The arguments of every benchmark; a script may add its own.

    Args:
        doc: the script's docstring; its first line is the help text.
        seeds: the default of --seeds.
    """
    made = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    made.add_argument("--small", action="store_true", help="a few minutes on 2 cores; bars on quality repeat the record")
    made.add_argument("--seeds", type=int, default=seeds, help="runs with different seeds, where seeds matter")
    made.add_argument("--out", type=Path, default=HERE / "out", help="where runs, plots and NAME.json go")
    made.add_argument("--record", action="store_true", help="keep the result of a full run in benchmarks/records/")
    return made


class Report:
    """What a benchmark claims and measured.

    Attributes:
        out: a directory for the benchmark's files.
        data: what was measured, ready for JSON.
    """

    def __init__(self, name: str, options: argparse.Namespace):
        self.name, self.small = name, options.small
        self.recording = options.record and not options.small
        self.out: Path = options.out / (f"{name}-small" if options.small else name)
        self.out.mkdir(parents=True, exist_ok=True)
        self.data: dict[str, Any] = {}
        self.bars: list[dict[str, Any]] = []
        self.provenance = provenance()
        self.began = time.perf_counter()
        if not torch.cuda.is_available():
            self.say("no CUDA GPU here: CPU figures only")

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def bar(self, claim: str, value: float | None, op: Literal["<=", ">="], limit: float, quality: bool = False) -> None:
        """Judge a claim. One on quality, at small size, is not judged by ``value`` but repeated from the record."""
        judged = "run"
        if quality and self.small:
            value, judged = recorded_value(self.name, claim), "record"
        holds = value is not None and (value <= limit if op == "<=" else value >= limit)
        self.bars.append({"claim": claim, "value": value, "op": op, "limit": limit, "holds": holds, "judged": judged})
        shown = "no record" if value is None else f"{value:.4g}"
        self.say(
            f"{'holds' if holds else 'MISSED'}: {claim}: {shown} {op} {limit} (by this {judged})".replace(
                "this record", "record"
            )
        )

    def finish(self) -> None:
        """Keep the result, and print it as the last line."""
        result = {
            "name": self.name,
            "small": self.small,
            "machine": machine(),
            "seconds": round(time.perf_counter() - self.began, 1),
            "bars": self.bars,
            "data": self.data,
        }
        text = json.dumps(result | self.provenance, indent=1) + "\n"
        (self.out / f"{self.name}.json").write_text(text)
        if self.recording:
            RECORDS.mkdir(exist_ok=True)
            record_path(self.name).write_text(text)
        print(json.dumps(result), flush=True)


def record_path(name: str) -> Path:
    return RECORDS / f"{name}.json"


def recorded_value(name: str, claim: str) -> float | None:
    """The recorded value of a claim; None where there is no record of it."""
    if not record_path(name).exists():
        return None
    bars = json.loads(record_path(name).read_text())["bars"]
    return next((bar["value"] for bar in bars if bar["claim"] == claim), None)


def remembered(path: Path, key: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """``work()``, or what an earlier start kept in ``path`` under the same key: long benchmarks are finished in pieces.

    The result carries the revision that it was measured with.
    """
    key = json.loads(json.dumps(key))
    if not path.exists() or json.loads(path.read_text())["key"] != key:
        write_atomically(path, json.dumps(work() | {"key": key, "revision": git_revision()}))
    found = json.loads(path.read_text())
    return {name: found[name] for name in found if name != "key"}


def spread(values: list[float]) -> dict[str, float]:
    """Repeated measurements as their median, quartiles and count."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high, "count": len(values)}


def provenance() -> dict[str, str | None]:
    script = Path(sys.argv[0]).name
    return {"commit": git_revision(), "command": " ".join(["python", f"benchmarks/{script}", *sys.argv[1:]])}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpus": gpus,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's name as the kernel tells it, where it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
