"""Engines: bytes that a rank sends per full merge, and what a merge of ZeRO-2's masters costs against the torch engine's.

A model of 30M parameters, as causal language models are shaped. Bytes: two workers of one rank, and of two. Seconds: the same
DiLoCo merge, of the same bytes between the workers, with the torch engine and with DeepSpeed's ZeRO 2, in turns, in the same
ranks. With two ranks a worker both spread what was merged inside the worker.

    python benchmarks/engines.py [--small] [--out DIR] [--record]
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from report import Report, parser, spread
from torch import nn

import distmerge as dm
from distmerge.config import toml
from distmerge.config import train as sections
from distmerge.config.train import TrainConfig
from distmerge.engine.build import build_engine
from distmerge.engine.engine import Engine
from distmerge.launch.ranks import Place
from distmerge.mesh import Mesh

HIDDEN, LAYERS, INNER = 512, 7, 1408
LIMIT = 1.5
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {"kind": "torch"},
    "fsdp": {"kind": "fsdp"},
    "zero 2": {"kind": "deepspeed", "config": {"zero_optimization": {"stage": 2}}},
}


class Blocks(nn.Module):
    """30M parameters in the shapes of a transformer's blocks; it is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13_000, HIDDEN)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    *(nn.Linear(HIDDEN, HIDDEN, bias=False) for _ in range(4)),
                    *(nn.Linear(HIDDEN, INNER, bias=False) for _ in range(3)),
                    nn.RMSNorm(HIDDEN),
                ]
            )
            for _ in range(LAYERS)
        )


def settings(engine: dict[str, Any], device: str) -> TrainConfig:
    mesh = {"workers": 2, "device": device, "timeout_seconds": 120}
    model = {"config": {"model_type": "llama"}}
    return toml.validate({"run_dir": "unused", "mesh": mesh, "model": model, "merge": [{"kind": "diloco"}], "engine": engine})


def measure(rank: int, ranks: int, port: int, repetitions: int, device: str) -> dict[str, Any]:
    """Bytes of one merge, and seconds of each, by engine."""
    dist.destroy_process_group()  # the mesh makes its own
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), LOCAL_RANK=str(rank))  # deepspeed asks for it
    place = Place(rank, ranks, rank, ranks)
    mesh = Mesh(sections.MeshSettings(workers=2, device=device, timeout_seconds=120), place, threads=1)  # pyright: ignore
    engines: dict[str, Engine] = {}
    mergers: dict[str, dm.DiLoCo] = {}
    for name, engine in ENGINES.items():
        torch.manual_seed(0)
        engines[name] = build_engine(Blocks(), settings(engine, device), mesh)
        mergers[name] = dm.DiLoCo(engines[name].parameters, every=1, group=mesh.peers)
    result: dict[str, Any] = {name: {"seconds": [], "bytes": 0.0, "numel": engines[name].parameters.numel} for name in ENGINES}
    for repetition in range(repetitions + 1):
        for name, merger in mergers.items():
            dist.barrier()
            began = time.perf_counter()
            report = merger.merge()
            if device == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            result[name]["bytes"] = report.bytes_sent
            if repetition:  # the first one touches the memory for the first time
                result[name]["seconds"].append(time.perf_counter() - began)
    for engine in engines.values():
        engine.close()
    return result


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("engines", options)
    repetitions = 5 if options.small else 15
    device = "cuda" if torch.cuda.device_count() >= 4 else "cpu"
    results = {}
    for ranks in (2, 4):
        results[ranks] = on_ranks(measure, ranks, ranks, free_port(), repetitions, device)[0]
        seconds = {name: spread(found["seconds"]) for name, found in results[ranks].items()}
        report.data[f"2 workers x {ranks // 2} ranks, {device}"] = {
            name: {"bytes_sent": found["bytes"], "parameters": found["numel"], "seconds": seconds[name]}
            for name, found in results[ranks].items()
        }
        pairs = zip(results[ranks]["zero 2"]["seconds"], results[ranks]["torch"]["seconds"], strict=True)
        ratio = spread([zero / plain for zero, plain in pairs])  # one after the other: what else runs slows them alike
        claim = f"a merge of ZeRO-2's 30M parameters against the torch engine's, 2 workers x {ranks // 2} ranks"
        report.bar(claim, round(ratio["median"], 3), "<=", LIMIT)
    for name in ENGINES:
        share = results[4][name]["bytes"] / results[2][name]["bytes"]
        report.bar(f"bytes per rank and merge of 2 x 2 against 2 x 1, {name}", round(share, 4), "<=", 0.501)
    report.finish()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
