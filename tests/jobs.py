"""Small training runs for the tests: a configuration and a text, real processes, and what they left behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PATIENCE_SECONDS = 1200.0
"""How long a test waits for what must happen: long enough for a machine with 15 processes a core. Waits end early, so it
costs nothing unless something is wrong."""

TIMING_KEYS = {"seconds", "tokens_per_second", "merge/seconds", "merge/wait_seconds"}

MODEL = """
[model.config]
model_type = "llama"
hidden_size = 16
intermediate_size = 24
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 2
tie_word_embeddings = true
"""
"""A few thousand parameters, as a table of a configuration."""

CONFIG = (
    """
run_dir = "{folder}/run"
steps = 60

[mesh]
workers = 2
device = "cpu"
"""
    + MODEL
    + """
[data]
source = "files"
files = ["{folder}/text.txt"]
sequence_length = 32
eval_fraction = 0.2

[train]
batch_size = 2
gradient_accumulation = 4
threads = 1

[optimizer]
lr = 4e-3

[[merge]]
kind = "diloco"
every = 7
outer_momentum = 0.5

[evaluate]
every = 10
sequences = 16

[checkpoint]
every = 5

[log]
every = 1
"""
)
"""A few thousand parameters; checkpoints fall between merges; every step is a line of the record."""


def write_config(folder: Path, text: str = CONFIG) -> str:
    """The path of a configuration whose run directory and text lie in ``folder``."""
    words = ["merge", "worker", "anchor", "delta", "moves", "the", "a", "of", "under"]
    lines = (" ".join(words[(index * step) % len(words)] for step in range(1, 12)) for index in range(7000))
    (folder / "text.txt").write_text("\n".join(lines))
    path = folder / "config.toml"
    path.write_text(text.format(folder=folder))
    return str(path)


class Job:
    """A started command, with its output in files and its ranks known by their environment."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str] | None = None):
        self.log = log
        with open(log, "w") as file:
            self.process = subprocess.Popen(
                [sys.executable, *command], stdout=file, stderr=subprocess.STDOUT, env=os.environ | (environment or {})
            )

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of the ranks that live."""
        found = {}
        for child in children(self.process.pid):
            rank = environment_of(child).get("RANK")
            if rank is not None:
                found[int(rank)] = child
        return found

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """The exit status; within a finite time, or the test fails."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.end()
            raise AssertionError(f"still running after {seconds} s:\n{self.output}") from None

    def end(self) -> None:
        """Whatever happens in a test, nothing is left running."""
        for process in (*self.ranks().values(), self.process.pid):
            kill(process, signal.SIGKILL)
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text()


def distmerge(arguments: list[str], log: Path, environment: dict[str, str] | None = None) -> Job:
    return Job(["-m", "distmerge", *arguments], log, environment)


def torchrun(ranks: int, arguments: list[str], log: Path) -> Job:
    return Job(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m", "distmerge", *arguments], log
    )


def children(parent: int) -> list[int]:
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split()]


def environment_of(process: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{process}/environ").read_bytes().decode()
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def kill(process: int, number: int) -> None:
    try:
        os.kill(process, number)
    except ProcessLookupError:
        return


def alive(process: int) -> bool:
    """Whether a process still runs; one that is dead and not yet waited for does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def wait_for(condition: Any, what: str, seconds: float = PATIENCE_SECONDS) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.001)
    return value


def lines_of(run: Path) -> list[dict[str, Any]]:
    """The record; a last line that is being written is left out."""
    path = run / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(run: Path) -> int:
    lines = lines_of(run)
    return lines[-1]["step"] if lines else 0


def untimed(run: Path) -> list[dict[str, Any]]:
    """The record without what depends on the clock."""
    return [{key: value for key, value in line.items() if key not in TIMING_KEYS} for line in lines_of(run)]


def final_bytes(run: Path) -> bytes:
    return (run / "final" / "model.safetensors").read_bytes()
