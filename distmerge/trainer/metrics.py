"""The metrics of a run: metrics.jsonl, TensorBoard files, and progress on the terminal."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from distmerge.engine.engine import StepResult
from distmerge.files.directories import guarded
from distmerge.files.lines import Lines
from distmerge.rundir.layout import RunDirectory
from distmerge.workers.divergence import MergeReport


class Meter:
    """Accumulates this rank's metrics since the last line of the log and since the start. Its state is part of checkpoints."""

    def __init__(self, device: torch.device, tokens_per_step: int):
        self.tokens_per_step = tokens_per_step
        self.seconds = 0.0  # training time, without evaluations and checkpoints
        self.log_bytes = 0  # length of metrics.jsonl at the last checkpoint
        self.first_eval: float | None = None
        self.line_steps, self.line_seconds = 0, 0.0
        self.loss_sum = torch.zeros((), device=device)
        self.grad_norm: Tensor | None = None
        self.seen: dict[str, Any] = {}
        self.clock = time.perf_counter()

    def observe(self, result: StepResult, lr: float, merges: list[MergeReport]) -> None:
        """Add one step's results to the next line. Nothing here synchronizes with the device."""
        self.loss_sum += result.loss
        self.grad_norm = result.grad_norm
        self.line_steps += 1
        self.seen["lr"] = lr
        for report in merges:
            self.seen["merge/seconds"] = self.seen.get("merge/seconds", 0.0) + report.seconds
            self.seen["merge/wait_seconds"] = self.seen.get("merge/wait_seconds", 0.0) + report.wait_seconds
            if report.divergence is not None:
                self.seen["merge/divergence"], self.seen["merge/correlation"] = report.divergence, report.correlation

    def read(self) -> dict[str, Any]:
        """The metrics since the last line; starts a new line."""
        self._tick()
        line = self.seen | {"seconds": self.seconds}
        if self.line_steps:
            line["train/loss"] = self.loss_sum.item() / self.line_steps
            line["tokens_per_second"] = self.line_steps * self.tokens_per_step / self.line_seconds
        if self.grad_norm is not None:
            line["grad_norm"] = self.grad_norm.item()
        self.loss_sum.zero_()
        self.seen, self.grad_norm = {}, None
        self.line_steps, self.line_seconds = 0, 0.0
        return line

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose duration is not counted as training time."""
        self._tick()
        yield
        self.clock = time.perf_counter()

    def _tick(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.clock
        self.line_seconds += now - self.clock
        self.clock = now

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("clock", "tokens_per_step")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.loss_sum.device
        vars(self).update(state)
        self.loss_sum = self.loss_sum.to(device)
        self.clock = time.perf_counter()


class MetricsLog:
    """Writes a run's metrics and events; only rank 0 creates one.

    metrics.jsonl is the record, with one JSON object per line. The TensorBoard files are written anew from it at each start, so
    truncating the record to the length it had at a checkpoint truncates both.

    Args:
        keep_bytes: length to which metrics.jsonl is truncated first, since later lines belong to steps after the checkpoint.
        steps: number of steps of the whole run.
        name: of this run if several share a terminal: its lines then begin with the name, and there is no progress bar.
    """

    def __init__(self, run: RunDirectory, keep_bytes: int, steps: int, name: str = ""):
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and only for this rank

        self.lines, self.events = Lines(run.metrics, keep_bytes), Lines(run.events)
        shutil.rmtree(run.tensorboard, ignore_errors=True)
        self.excepthook, threading.excepthook = threading.excepthook, self._thread_failed
        self.board = SummaryWriter(str(run.tensorboard))
        for line in self.lines.read():
            self._draw(line)
        for line in self.events.read():
            self._note(line)
        self.steps, self.name = steps, name
        self.bar = progress_bar(steps) if sys.stderr.isatty() and not name else None
        for record in (self.lines, self.events):
            if record.cut_bytes:
                self.say(f"removed {record.cut_bytes} bytes of incomplete data, left by a crash, from the end of {record.path}")

    def durable_bytes(self) -> int:
        """Flush metrics and events to disk and return the length of metrics.jsonl. A checkpoint stores the length, so that a
        resume can truncate the file to it; flushing first ensures that the file is never shorter."""
        guarded(self.events.path, self.events.sync)
        return guarded(self.lines.path, self.lines.sync)

    def write(self, line: dict[str, Any]) -> None:
        guarded(self.lines.path, lambda: self.lines.append(line))
        guarded(self.lines.path.parent, lambda: self._draw(line))
        self.say("  ".join(shown(line, self.steps)), line["step"])

    def event(self, step: int, kind: str, facts: dict[str, Any]) -> None:
        """Record a decision as a line of events.jsonl, which is append-only, and as text in TensorBoard."""
        line = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, "event": kind} | facts
        guarded(self.events.path, lambda: self.events.append(line))
        guarded(self.events.path.parent, lambda: self._note(line))
        if kind != "block":
            self.say(f"step {step}: {kind}: " + ", ".join(f"{key} {brief(value)}" for key, value in facts.items()))

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Suppress the traceback of TensorBoard's writer thread: the next call to the writer raises the same error, which is
        then reported in one line."""
        if not type(failure.thread).__module__.startswith("tensorboard."):
            self.excepthook(failure)

    def _note(self, line: dict[str, Any]) -> None:
        self.board.add_text(f"events/{line['event']}", json.dumps(line), line["step"])
        self.board.flush()

    def say(self, text: str, step: int | None = None) -> None:
        """Print a line to standard error, or move the progress bar and show the line beside it if ``step`` is given."""
        if self.bar is None:
            print(f"{self.name}: {text}" if self.name else text, file=sys.stderr, flush=True)
            return
        if step is None:
            self.bar.console.print(text, highlight=False)
        else:
            self.bar.update(self.bar.task_ids[0], completed=step, description=text.partition("  ")[2])

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.durable_bytes()
        self.board.close()
        threading.excepthook = self.excepthook
        self.events.close()
        self.lines.close()

    def _draw(self, line: dict[str, Any]) -> None:
        for key, value in line.items():
            if key != "step" and value is not None:
                self.board.add_scalar(key, value, line["step"])
        self.board.flush()


def brief(value: Any) -> Any:
    """A value as the terminal shows it: floats with four decimals."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {brief(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(str(brief(item)) for item in value)
    return f"{value:.4f}" if isinstance(value, float) and 1e-3 <= abs(value) < 1e4 else value


def progress_bar(steps: int) -> Progress:
    columns = (MofNCompleteColumn(), BarColumn(bar_width=20), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar = Progress(*columns)
    bar.add_task("", total=steps)
    bar.start()
    return bar


def shown(line: dict[str, Any], steps: int) -> list[str]:
    """The parts of a line of metrics that the terminal shows."""
    parts = [f"step {line['step']:>{len(str(steps))}}/{steps}"]
    for key, form in (
        ("train/loss", "loss {:.3f}"),
        ("eval/loss", "eval {:.3f}"),
        ("eval/loss_se", "+- {:.3f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
    ):
        if line.get(key) is not None:
            parts.append(form.format(line[key]))
    if line.get("merge/bytes_sent"):
        parts.append(f"sent {megabytes(line['merge/bytes_sent'])}")
    return parts


def megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.1f} MB" if size_bytes < 1e10 else f"{size_bytes / 1e9:,.1f} GB"


def table(directory: RunDirectory, summary: dict[str, Any]) -> str:
    """The results of a run as a table for the terminal."""
    board = Path(sys.executable).with_name("tensorboard")
    sent, data_parallel = summary["bytes_sent"], summary["bytes_sent_by_data_parallelism"]
    first, last, error = summary["eval_loss_first"], summary["eval_loss_last"], summary.get("eval_loss_last_se")
    spread = "" if error is None else f" +- {error:.3f}"
    rows = {
        "eval loss": f"{first:.3f} at the start, {last:.3f}{spread} at the end (nats/token)",
        "tokens": f"{summary['tokens']:,} ({summary['workers']} workers, {summary['ranks']} ranks, {summary['steps']} steps)",
        "tokens/s": f"{summary['tokens_per_second']:,.0f}",
        "sent per worker": f"{megabytes(sent)}; data parallelism: {megabytes(data_parallel)}"
        + (f", {data_parallel / sent:.0f}x as much" if sent else ""),
        "model": str(directory.final),
        "TensorBoard": f"{board if board.exists() else 'tensorboard'} --logdir {directory.tensorboard}",
    }
    if summary["ranks"] == 1:
        del rows["sent per worker"]
    elif summary["workers"] == 1:
        rows["sent per worker"] = f"{megabytes(data_parallel)} per rank, of gradients: one worker, data parallelism"
    return "\n" + "\n".join(f"{name:<16} {value}" for name, value in rows.items())
