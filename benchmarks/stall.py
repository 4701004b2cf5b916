"""How long training stands still: for an asynchronous checkpoint, and for a step of the window.

Against one copy of the same state in memory (into memory that is there already), and one lerp of the same vector.

    python benchmarks/stall.py [--small] [--out DIR] [--record]
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import Report, parser, spread
from torch import nn

from distmerge.checkpoints.store import Store
from distmerge.config.checkpoints import WindowSettings
from distmerge.config.train import MeshSettings
from distmerge.launch.ranks import Place
from distmerge.mesh import Mesh
from distmerge.model import load_tokenizer
from distmerge.theta.flat import FlatParameters
from distmerge.windows.window import Window

REPEATS = 15


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("stall", options)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    mesh = Mesh(MeshSettings(device="cpu"), Place(0, 1, 0, 1), threads=1)
    width, layers = (512, 16) if options.small else (1024, 24)
    flat = FlatParameters(nn.ModuleList([nn.Linear(width, width) for _ in range(layers)]))
    report.data |= {"parameters": flat.vector.numel(), "state_bytes": 12 * flat.vector.numel()}
    checkpoint(report, flat, mesh)
    block(report, flat, mesh)
    mesh.close()
    report.finish()


def checkpoint(report: Report, flat: FlatParameters, mesh: Mesh) -> None:
    """Parameters and two moments, tensor by tensor, as a trainer holds them."""
    moments = [torch.randn_like(flat.vector) for _ in range(2)]
    state = {
        "parameters-00000.safetensors": dict(flat.named_views()),
        "optimizer-00000.pt": [
            {
                slot.name: {"exp_avg": a[slot.offset : slot.stop], "exp_avg_sq": b[slot.offset : slot.stop]}
                for slot in flat.layout
                for a, b in [moments]
            }
        ],
    }
    vectors = [flat.vector, *moments]
    copies = [vector.clone() for vector in vectors]
    root = report.out / "checkpoints"
    shutil.rmtree(root, ignore_errors=True)
    store = Store(root, mesh, keep=1, asynchronous=True)
    store.open()
    stalls, floors = [], []
    for step in range(REPEATS + 1):
        stalls.append(timed(lambda step=step: store.commit(step, state)))
        store.wait()
        floors.append(timed(lambda: [copy.copy_(vector) for copy, vector in zip(copies, vectors, strict=True)]))
    shutil.rmtree(root)
    ratios = [stall / floor for stall, floor in zip(stalls[1:], floors[1:], strict=True)]  # the first makes its memory
    report.data |= {"first_stall_seconds": stalls[0], "stall_seconds": spread(stalls[1:]), "copy_seconds": spread(floors[1:])}
    ratio = spread(stalls[1:])["median"] / spread(floors[1:])["median"]
    report.data["stall_ratios"] = spread(ratios)
    report.bar("an asynchronous checkpoint stalls at most 1.3x one copy of the state in memory", ratio, "<=", 1.3)


def block(report: Report, flat: FlatParameters, mesh: Mesh) -> None:
    section = WindowSettings(every=10**9, store="memory")
    window = Window(section, Path("unused"), flat, [], mesh, 1, load_tokenizer("bytes"), lambda *told: None)
    mean, loss = torch.zeros_like(flat.vector), torch.tensor(1.0)
    updates, lerps = [], []
    for step in range(1, 4 * REPEATS):
        updates.append(timed(lambda step=step: window.observe(step, 1e-3, loss)))
        lerps.append(timed(lambda step=step: mean.lerp_(flat.vector, 1 / step)))
    report.data |= {"update_seconds": spread(updates[2:]), "lerp_seconds": spread(lerps[2:])}
    ratio = spread(updates[2:])["median"] / spread(lerps[2:])["median"]
    report.bar("a block's update takes at most 1.3x one lerp of the vector", ratio, "<=", 1.3)


if __name__ == "__main__":
    main()
