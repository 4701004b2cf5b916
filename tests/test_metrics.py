"""The record: cut back on a resume, TensorBoard drawn again from it, and what a line says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distmerge.engine.engine import StepResult
from distmerge.rundir.layout import RunDirectory
from distmerge.trainer.metrics import Meter, MetricsLog, megabytes, shown, table
from distmerge.workers.diloco import MergeReport


def drawn(run: RunDirectory) -> dict[str, list[tuple[int, float]]]:
    """What a reader of the TensorBoard directory sees."""
    events = EventAccumulator(str(run.tensorboard)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def lines(steps: range) -> list[dict[str, Any]]:
    return [{"step": step, "train/loss": 1.0 / (step + 1), "eval/loss": 2.0 if step % 2 else None} for step in steps]


def written(run: RunDirectory) -> list[int]:
    return [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]


def test_cut_back_and_drawn_again(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    log = MetricsLog(run, 0, 10)
    for line in lines(range(4)):
        log.write(line)
    kept = log.durable_bytes()
    for line in lines(range(4, 7)):
        log.write(line)
    log.close()
    with open(run.metrics, "a") as file:
        file.write('{"step": 7, "train/')  # what a kill leaves
    log = MetricsLog(run, kept, 10)
    assert written(run) == [0, 1, 2, 3]
    log.write(lines(range(4, 5))[0])
    log.close()
    assert written(run) == [0, 1, 2, 3, 4]
    assert drawn(run)["train/loss"] == [(step, pytest.approx(1.0 / (step + 1))) for step in range(5)]
    assert drawn(run)["eval/loss"] == [(1, 2.0), (3, 2.0)]
    assert len(list(run.tensorboard.iterdir())) == 1, "no older picture is left"


def test_a_new_run_begins_an_empty_record(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 3}\n')
    MetricsLog(run, 0, 10).close()
    assert written(run) == []


def test_a_record_shorter_than_the_checkpoint_remembers(tmp_path: Path) -> None:
    """A disk that lost the record's tail must not grow zero bytes there."""
    run = RunDirectory(tmp_path)
    run.metrics.write_text('{"step": 3}\n')
    MetricsLog(run, 1000, 10).close()
    assert run.metrics.read_text() == '{"step": 3}\n'


def result(loss: float, norm: float = 1.0) -> StepResult:
    return StepResult(torch.tensor(loss), torch.tensor(norm))


def report(number: int) -> MergeReport:
    return MergeReport(number, 5, 0.5 * number, 0.25, 2, 100.0, 1.5, 0.5)


def test_a_line_is_what_was_seen_since_the_line_before() -> None:
    meter = Meter(torch.device("cpu"), tokens_per_step=10)
    meter.observe(result(1.0), 0.1, [])
    meter.observe(result(2.0, 3.0), 0.2, [report(1), report(2)])
    line = meter.read()
    assert (line["train/loss"], line["grad_norm"], line["lr"]) == (1.5, 3.0, 0.2)
    assert (line["merge/seconds"], line["merge/divergence"]) == (3.0, 1.0)
    assert line["tokens_per_second"] > 0
    meter.observe(result(4.0), 0.2, [])
    line = meter.read()
    assert line["train/loss"] == 4.0
    assert "merge/seconds" not in line
    assert meter.read().keys() & {"train/loss", "grad_norm", "tokens_per_second"} == set()


def test_a_meter_resumes_in_mid_line(tmp_path: Path) -> None:
    first, second = (Meter(torch.device("cpu"), 10) for _ in range(2))
    first.observe(result(1.0), 0.1, [report(1)])
    first.first_eval, first.log_bytes = 5.5, 123
    torch.save(first.state_dict(), tmp_path / "meter.pt")
    second.load_state_dict(torch.load(tmp_path / "meter.pt", weights_only=True))
    for meter in (first, second):
        meter.observe(result(3.0), 0.1, [])
    one, other = first.read(), second.read()
    for key in ("train/loss", "grad_norm", "merge/divergence", "merge/seconds"):
        assert one[key] == other[key]
    assert (second.first_eval, second.log_bytes) == (5.5, 123)


def test_pauses_are_no_training() -> None:
    meter = Meter(torch.device("cpu"), 10)
    with meter.paused():
        before = meter.seconds
        torch.zeros(1000).exp().sum()
        meter_clock = meter.clock
    assert meter.seconds == before
    assert meter.clock > meter_clock


def test_for_people() -> None:
    assert megabytes(1.26e6) == "1.3 MB"
    assert megabytes(25e9) == "25.0 GB"
    assert shown({"step": 7, "train/loss": 1.5, "eval/loss": None, "merge/bytes_sent": 2e6}, 100) == [
        "step   7/100", "loss 1.500", "sent 2.0 MB",
    ]  # fmt: skip
    summary = {
        "steps": 10, "workers": 2, "ranks": 4, "eval_loss_first": 5.0, "eval_loss_last": 4.0, "tokens": 1000,
        "tokens_per_second": 50.0, "bytes_sent": 2e6, "bytes_sent_by_data_parallelism": 20e6,
    }  # fmt: skip
    text = table(RunDirectory("a/run"), summary)
    assert "5.000 at the start, 4.000 at the end" in text
    assert "2.0 MB; data parallelism: 20.0 MB, 10x as much" in text
    assert "a/run/final" in text
    assert "0.0 MB; data parallelism: 20.0 MB\n" in table(RunDirectory("a"), summary | {"bytes_sent": 0.0})
    alone = table(RunDirectory("a"), summary | {"bytes_sent": 0.0, "workers": 1})
    assert "20.0 MB per rank, of gradients" in alone and " 0.0 MB" not in alone, (
        "one worker sends gradients, and merges nothing"
    )
