"""What a run says while it trains: metrics.jsonl, TensorBoard, and progress for whoever looks."""

from __future__ import annotations

import json
import os
import shutil
import sys
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from distmerge.rundir import RunDirectory


class Metrics:
    """Writes a run's metrics; only rank 0 makes one.

    metrics.jsonl is the record, one JSON object a line. The TensorBoard files are a picture of it, drawn again from it on
    each start: so cutting the record back to a checkpoint cuts both.
    """

    def __init__(self, run: RunDirectory, keep_bytes: int, steps: int):
        from torch.utils.tensorboard import SummaryWriter

        self.file = open(run.metrics, "a")  # noqa: SIM115: open for the whole run
        self.file.truncate(min(keep_bytes, os.fstat(self.file.fileno()).st_size))
        shutil.rmtree(run.tensorboard, ignore_errors=True)
        self.board = SummaryWriter(str(run.tensorboard))
        for line in run.metrics.read_text().splitlines():
            self._draw(json.loads(line))
        self.steps = steps
        self.bar = progress_bar(steps) if sys.stderr.isatty() else None

    @property
    def bytes_written(self) -> int:
        """The record's length: part of a checkpoint, so that a resume can cut it back."""
        return os.fstat(self.file.fileno()).st_size

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        self._draw(line)
        self.say("  ".join(shown(line, self.steps)), line["step"])

    def say(self, text: str, step: int | None = None) -> None:
        """A line for people, and the bar moved."""
        if self.bar is None:
            print(text, file=sys.stderr, flush=True)
            return
        if step is None:
            self.bar.console.print(text, highlight=False)
        else:
            self.bar.update(self.bar.task_ids[0], completed=step, description=text.partition("  ")[2])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.board.close()
        self.file.close()

    def _draw(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and value is not None:
                self.board.add_scalar(key, value, line["step"])
        self.board.flush()


def progress_bar(steps: int) -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns)
    bar.add_task("", total=steps)
    bar.start()
    return bar


def shown(line: dict[str, Any], steps: int) -> list[str]:
    """The parts of a line that a person wants to see pass by."""
    parts = [f"step {line['step']:>{len(str(steps))}}/{steps}"]
    for key, form in (
        ("train/loss", "loss {:.3f}"),
        ("eval/loss", "eval {:.3f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    ):
        if line.get(key) is not None:
            parts.append(form.format(line[key]))
    if line.get("merge/bytes_sent"):
        parts.append(f"sent {megabytes(line['merge/bytes_sent'])}")
    return parts


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes < 1e10 else f"{size_bytes / 1e9:,.1f} GB"
