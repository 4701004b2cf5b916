"""distmerge window over ten blocks of 700 MB (70 MB with --small) against reading them once and writing one.

The floor reads each block into one reused buffer, and writes one block's bytes with an fsync; both on a warm cache, in turns.
The merge runs in a process of its own, which tells the seconds after its imports and its peak of anonymous memory. It runs once
over blocks as a run publishes them, and once over the same models without their records, which are hashed by SHA-256.

    python benchmarks/window_io.py [--small] [--out DIR] [--record]
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from report import Report, parser, spread
from safetensors.torch import save_file

from distmerge.files.directories import publish_directory
from distmerge.windows.blocks import RECORD, Block, record_of

BLOCKS = 10
REPEATS = 5

CHILD = """
import json, sys, threading, time
import distmerge.windows.merge, distmerge.files.stream
from distmerge.cli import main as cli

def anonymous():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

peak, done = [anonymous()], threading.Event()
def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], anonymous())
watcher = threading.Thread(target=watch)
watcher.start()
began = time.perf_counter()
cli.run(sys.argv[1:])
seconds = time.perf_counter() - began
done.set()
watcher.join()
print(json.dumps({"seconds": seconds, "anonymous_bytes": peak[0]}))
"""


def make_blocks(root: Path, size_bytes: int) -> list[Path]:
    """Ten bfloat16 models that differ a little, in tensors of 8 MB, published as a run's blocks are."""
    shutil.rmtree(root, ignore_errors=True)
    generator = torch.Generator().manual_seed(0)
    count = max(1, size_bytes // (8 << 20))
    names = [f"model.layers.{index}.mlp.up_proj.weight" for index in range(count)]
    base = [torch.randn(1024, 4096, generator=generator) * 0.02 for _ in range(min(4, count))]
    paths = []
    for index in range(BLOCKS):
        tensors = {name: (base[at % len(base)] * (1 + 0.01 * index)).bfloat16() for at, name in enumerate(names)}
        block = Block(100 * index + 1, 100 * index + 100, 1000 * index, 1000 * index + 1000, 1e-3, 2.0, "mean", 0)
        paths.append(root / block.name)
        publish_directory(paths[-1], record_of(block), functools.partial(write_model, tensors), RECORD)
    os.sync()  # or the kernel would write them out behind what is measured
    return paths


def write_model(tensors: dict[str, torch.Tensor], directory: Path) -> None:
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def floor(paths: list[Path], out: Path) -> float:
    """Seconds to read every block once into a reused buffer and to write one."""
    files = [path / "model.safetensors" for path in paths]
    buffer = bytearray(1 << 24)
    began = time.perf_counter()
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    with open(out, "wb", buffering=0) as file:
        left = files[0].stat().st_size
        while left > 0:
            left -= file.write(memoryview(buffer)[: min(left, len(buffer))])
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def without_records(paths: list[Path]) -> list[Path]:
    """The same models as foreign checkpoints: links to the files, no block.json."""
    bare = [path.with_name(f"checkpoint-{step}") for step, path in enumerate(paths)]
    for path, link in zip(paths, bare, strict=True):
        link.mkdir()
        os.link(path / "model.safetensors", link / "model.safetensors")
    return bare


def merge(paths: list[Path], out: Path) -> dict[str, float]:
    """What a process of its own says of the merge."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", CHILD, "window", *map(str, paths), "--curve", "linear", "--out", str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(out)
    return json.loads(run.stdout.splitlines()[-1])


def free_bytes() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("window_io", options)
    size = 72 << 20 if options.small else 704 << 20
    if free_bytes() < 1.5 * (BLOCKS + 2) * size:
        report.say(f"skipped: {free_bytes() >> 20} MB of memory do not hold {BLOCKS} blocks of {size >> 20} MB in the cache")
        report.data["skipped"] = "memory for the cache is short"
        report.finish()
        return
    root = report.out / "blocks"
    paths = make_blocks(root, size)
    bare = without_records(paths)
    floors, merges, unrecorded = [], [], []
    for _ in range(REPEATS + 1):
        floors.append(floor(paths, report.out / "floor.bin"))
        merges.append(merge(paths, report.out / "merged"))
        unrecorded.append(merge(bare, report.out / "merged"))
    shutil.rmtree(root)
    seconds = [run["seconds"] for run in merges[1:]]  # the first round warms the cache
    report.data |= {"block_bytes": size, "floor_seconds": spread(floors[1:]), "merge_seconds": spread(seconds)}
    report.data["without_records_seconds"] = spread([run["seconds"] for run in unrecorded[1:]])
    report.say(f"without the blocks' records: {report.data['without_records_seconds']['median']:.2f} s")
    ratio = spread(seconds)["median"] / spread(floors[1:])["median"]
    report.bar("distmerge window's work takes at most 1.5x reading the blocks and writing one", ratio, "<=", 1.5)
    memory = max(run["anonymous_bytes"] for run in (*merges, *unrecorded)) / 1e6
    report.bar("MB of anonymous memory", memory, "<=", 400)
    report.finish()


if __name__ == "__main__":
    main()
