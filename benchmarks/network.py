"""Two workers on a slow link: tokens/s and loss against wall-clock, and whether overlap is real.

Two network namespaces of this machine are joined by a link shaped to 100 Mbit/s (ip, tc; needs root). One torchrun node runs in
each. The link's own byte counters stand beside the ledger. Everything that was made is removed at the end; where namespaces
may not be made, the script says so and judges nothing.

    python benchmarks/network.py [--small] [--out DIR] [--record] [--files GLOB ...]
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w
from report import RECORDS, Report, parser

RATE = "100mbit"
NODES = ((f"dm{os.getpid()}a", "10.231.77.1"), (f"dm{os.getpid()}b", "10.231.77.2"))
"""Namespaces and the addresses inside them; nothing outside of them is used."""

FRAMING = 1514 / 1448
"""Bytes on the link for a byte of a stream: 14 of Ethernet, 20 of IP and 32 of TCP for 1448 of payload."""

SMALL_MODEL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "num_attention_heads": 4}
LARGE_MODEL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 5, "num_attention_heads": 4}


@dataclass(frozen=True)
class Arm:
    """One run: its merges (none: data parallelism), its model."""

    name: str
    merge: tuple[dict[str, Any], ...]
    steps: int
    model: dict[str, int]
    batch_size: int = 8

    def config(self, run_dir: Path, files: list[str]) -> dict[str, Any]:
        data: dict[str, Any] = {"source": "files", "files": files} if files else {"source": "stdlib"}
        shared = {"model_type": "llama", "max_position_embeddings": 128, "tie_word_embeddings": True}
        return {
            "run_dir": str(run_dir),
            "steps": self.steps,
            "mesh": {"workers": 2 if self.merge else 1, "device": "cpu"},
            "model": {"config": shared | self.model | {"num_key_value_heads": self.model["num_attention_heads"]}},
            "data": data | {"sequence_length": 128},
            "train": {"batch_size": self.batch_size, "threads": 1},
            "optimizer": {"lr": 2e-3},
            "schedule": {"warmup": min(20, self.steps)},
            "merge": list(self.merge),
            "evaluate": {"every": max(20, self.steps // 5), "sequences": 256},
            "checkpoint": {"every": self.steps, "keep": 1},
            "log": {"every": 5},
        }


def arms(steps: int) -> list[Arm]:
    streaming = {"kind": "streaming-diloco", "every": 20, "fragments": 2, "overlap": 4, "wire": "int4"}
    sparta = {"kind": "sparta", "fraction": 0.005}
    merges: dict[str, tuple[dict[str, Any], ...]] = {
        "no communication": ({"kind": "none"},),
        "streaming int4": (streaming,),
        "DiLoCo": ({"kind": "diloco", "every": 20, "outer_lr": 0.7, "outer_momentum": 0.5},),
        "SPARTA": (sparta,),
        "SPARTA + DiLoCo": (sparta, {"kind": "diloco", "every": 100, "outer_lr": 0.7, "outer_momentum": 0.5}),
        "data parallelism": (),
    }
    return [Arm(name, merge, steps, SMALL_MODEL) for name, merge in merges.items()]


def overlap_arms(steps: int) -> list[Arm]:
    """The same fp32 merges of 4M parameters, waited for and not."""
    plain = {"kind": "diloco", "every": steps // 2 - 1, "outer_lr": 0.7, "outer_momentum": 0.5}
    return [
        Arm("overlap 0", (plain,), steps, LARGE_MODEL),
        Arm("overlap", (plain | {"overlap": steps // 2 - 2, "mix": 0.5},), steps, LARGE_MODEL),
    ]


@contextlib.contextmanager
def network() -> Iterator[None]:
    """Two namespaces and a shaped link between them, removed at the end whatever happens."""
    names = [name for name, _ in NODES]
    try:
        for name in names:
            call("ip", "netns", "add", name)
        call("ip", "link", "add", "link0", "netns", names[0], "type", "veth", "peer", "name", "link0", "netns", names[1])
        for name, address in NODES:
            call("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "link0")
            call("ip", "-n", name, "link", "set", "link0", "up")
            call("ip", "-n", name, "link", "set", "lo", "up")
            call("tc", "-n", name, *f"qdisc add dev link0 root tbf rate {RATE} burst 64kb latency 200ms".split())
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def call(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sent_bytes(node: str) -> int:
    """What the node's end of the link has sent, by the kernel's count of frames."""
    return json.loads(call("ip", "-n", node, "-s", "-j", "link", "show", "dev", "link0"))[0]["stats64"]["tx"]["bytes"]


class Running:
    """An arm under way: one torchrun node in each namespace."""

    def __init__(self, arm: Arm, report: Report, files: list[str], repetition: int):
        self.arm = arm
        name = f"{arm.name.replace(' ', '-')}-{repetition}"
        self.run_dir = report.out / name
        subprocess.run(["rm", "-rf", str(self.run_dir)], check=True)
        path = report.out / f"{name}.toml"
        path.write_text(tomli_w.dumps(arm.config(self.run_dir, files)))
        self.log = report.out / f"{name}.log"
        self.processes = [self._node(index, path) for index in range(2)]

    def _node(self, index: int, path: Path) -> subprocess.Popen:
        name, address = NODES[index]
        command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
        command += ["--node-rank", str(index), "--nproc-per-node", "1", "--master-addr", NODES[0][1], "--master-port", "29517"]
        command += ["--local-addr", address, "-m", "distmerge", "train", str(path)]
        env = os.environ | {"GLOO_SOCKET_IFNAME": "link0", "OMP_NUM_THREADS": "1"}
        with open(self.log if index == 0 else os.devnull, "w") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=env)

    def wait(self) -> list[tuple[dict[str, Any], int]]:
        """Until it ends; the lines of the metrics as they came, each with the link's count at that moment."""
        seen: list[tuple[dict[str, Any], int]] = []
        while any(process.poll() is None for process in self.processes):
            lines = self._lines()
            if len(lines) > len(seen):
                count = sent_bytes(NODES[0][0])
                seen += [(line, count) for line in lines[len(seen) :]]
            time.sleep(0.02)
        if any(process.returncode for process in self.processes):
            sys.exit(f"{self.arm.name} failed:\n{self.log.read_text()[-2000:]}")
        return seen

    def _lines(self) -> list[dict[str, Any]]:
        path = self.run_dir / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.split("\n")[:-1]]


def run(arm: Arm, report: Report, files: list[str], repetition: int) -> dict[str, Any]:
    seen = Running(arm, report, files, repetition).wait()
    # At these steps nothing is in flight. The first lines warm up, and the connections are made in them.
    training = [(line, count) for line, count in seen if "train/loss" in line and line["step"] % 10 == 5]
    (first, first_count), (last, last_count) = training[len(training) // 5], training[-1]
    tokens, seconds = last["tokens"] - first["tokens"], last["seconds"] - first["seconds"]
    waits = [line["merge/wait_seconds"] for line, _ in training if "merge/wait_seconds" in line]
    steps = tokens / (training[0][0]["tokens"] / training[0][0]["step"])
    result = {
        "tokens_per_second": tokens / seconds,
        "link_bytes": last_count - first_count,
        "framed_ledger_bytes": FRAMING * (last["merge/bytes_sent"] - first["merge/bytes_sent"]),
        "ledger_bytes": last["merge/bytes_sent"] - first["merge/bytes_sent"],
        "steps": steps,
        "wait_seconds_per_merge": statistics.median(waits) if waits else 0.0,
        "curve": [(line["seconds"], line["eval/loss"]) for line, _ in seen if "eval/loss" in line and "seconds" in line],
        "last_eval_loss": seen[-1][0]["eval/loss"],
        "parameters": json.loads((report.out / f"{arm.name.replace(' ', '-')}-{repetition}" / "summary.json").read_text())[
            "parameters"
        ],
    }
    if not arm.merge:  # DDP's all-reduce of the gradients
        result["ledger_bytes"] = steps * 4 * result["parameters"]
        result["framed_ledger_bytes"] = FRAMING * result["ledger_bytes"]
    speed, sent = result["tokens_per_second"], f"link {result['link_bytes']:,} bytes, ledger {result['ledger_bytes']:,.0f}"
    report.say(f"{arm.name}: {speed:,.0f} tokens/s, {sent}")
    return result


def plot(results: dict[str, list[dict[str, Any]]], report: Report) -> None:
    """Loss against wall-clock."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, runs in results.items():
        axes.plot(*zip(*runs[0]["curve"], strict=True), marker="o", markersize=3, label=name)
    axes.set(xlabel=f"training seconds, two workers on {RATE}", ylabel="eval loss (nats/token)", xscale="log")
    axes.legend()
    figure.tight_layout()
    for folder in (report.out, *([RECORDS] if report.recording else [])):
        figure.savefig(folder / "network.png", dpi=100)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--files", nargs="+", default=[], metavar="GLOB", help="other text than the standard library")
    options = arguments.parse_args()
    report = Report("network", options)
    try:
        with network():
            measure(report, options)
    except (subprocess.CalledProcessError, FileNotFoundError, PermissionError) as error:
        report.say(f"network namespaces cannot be made here ({error}); nothing was measured")
    report.finish()


def measure(report: Report, options: Any) -> None:
    steps, repetitions = (100, 1) if options.small else (120, 3)
    chosen = arms(steps)
    results: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in chosen}
    for repetition in range(repetitions):
        for arm in chosen:
            if repetition == 0 or arm.name in ("no communication", "streaming int4"):
                results[arm.name].append(run(arm, report, options.files, repetition))
    waiting = {arm.name: run(arm, report, options.files, 0) for arm in overlap_arms(30)}
    plot(results, report)
    report.data |= {"rate": RATE, "arms": results, "overlap": waiting}
    speeds = {name: statistics.median(r["tokens_per_second"] for r in runs) for name, runs in results.items()}
    report.data["tokens_per_second"] = speeds
    share = speeds["streaming int4"] / speeds["no communication"]
    report.bar("tokens/s of streaming int4 against no communication, 100 Mbit/s", share, ">=", 0.95)
    report.data["data parallelism's share"] = speeds["data parallelism"] / speeds["no communication"]
    for name in ("streaming int4", "DiLoCo", "SPARTA", "SPARTA + DiLoCo", "data parallelism"):
        first = results[name][0]
        report.bar(
            f"the link's bytes against the ledger's with framing, apart by, {name}",
            abs(first["link_bytes"] / first["framed_ledger_bytes"] - 1),
            "<=",
            0.05,
        )
    blocked = waiting["overlap"]["wait_seconds_per_merge"] / waiting["overlap 0"]["wait_seconds_per_merge"]
    report.bar("seconds blocked per fp32 merge of 4M parameters, overlap against none", blocked, "<=", 0.1)


if __name__ == "__main__":
    main()
