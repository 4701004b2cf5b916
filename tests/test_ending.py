"""How a run ends: a model that is no result is kept under a name that says so, in one line, with an exit status of its own."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distmerge.checkpoints.verify import verify_run
from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.launch.ranks import DIVERGED, explain_failure
from distmerge.trainer.ending import divergence, finite
from tests import jobs
from tests.checkpoints.runs import run, write_text
from tests.ranks import Outcome, Ranks, command

SHORT = ("--steps", "4", "--train.gradient-accumulation", "1", "--evaluate.every", "100", "--log.every", "2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def summary_of(run_dir: Path) -> dict[str, Any]:
    """The summary, which must be JSON as everybody's parser reads it."""

    def refuse(word: str) -> None:
        raise AssertionError(f"summary.json holds {word}")

    return json.loads((run_dir / "summary.json").read_text(), parse_constant=refuse)


def test_a_model_that_is_not_finite_is_no_final_model(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture) -> None:
    for _ in range(2):  # started again, it says the same
        with pytest.raises(SystemExit) as end:
            run(tmp_path, "run", text, steps=4, optimizer={"lr": 1e300})
        assert end.value.code == DIVERGED
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(said) == 1 and "diverged: its parameters are not finite" in said[0]
        assert not (tmp_path / "run" / "final").exists()
        assert (tmp_path / "run" / "final.diverged" / "config.json").exists()
        assert summary_of(tmp_path / "run")["eval_loss_last"] is None
    verdicts = {verdict.path: verdict.damaged for verdict in verify_run(tmp_path / "run")}
    assert verdicts["final.diverged"] is False


def test_two_workers_that_end_above_their_start_say_so_once(ranks: Ranks, tmp_path: Path) -> None:
    """The job's status, too, and again when the command is started again; a healthy end then takes its place."""
    config, run_dir = jobs.write_config(tmp_path), tmp_path / "run"
    arguments = ["train", config, *SHORT, "--run-dir", str(run_dir), "--optimizer.lr", "3", "--optimizer.name", "muon"]
    outcomes: list[Outcome] = ranks.run(2, command, arguments, group=False)
    assert [outcome.status for outcome in outcomes] == [DIVERGED] * 2, outcomes
    said = [line for outcome in outcomes for line in outcome.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1 and "above the" in said[0]
    summary = summary_of(run_dir)
    assert summary["eval_loss_last"] > summary["eval_loss_first"] and summary["diverged"]
    assert not (run_dir / "final").exists()
    assert main.run(arguments) == DIVERGED, "nothing is trained again"


def test_the_launcher_passes_the_status_on() -> None:
    class Failure:
        exitcode = DIVERGED

    class Error:
        failures = {0: Failure()}  # noqa: RUF012

    assert explain_failure(Error()) == DIVERGED


class Alone:
    """A model that a rank holds alone, as far as the judgement looks."""

    def __init__(self, *values: float, buffer: float = 0.0):
        self.vector = torch.tensor(values)
        self.model = torch.nn.BatchNorm1d(1)
        self.model.running_mean.fill_(buffer)  # pyright: ignore

    def pull(self) -> None: ...


@pytest.mark.parametrize(
    ("model", "first", "last", "reason"),
    [
        (Alone(1.0), 6.0, 2.0, None),
        (Alone(1.0), 6.0, 6.01, None),
        (Alone(1.0), None, 2.0, None),
        (Alone(1.0), 6.0, 6.1, "above the 6.000"),
        (Alone(1.0), 6.0, 262.0, "above the 6.000"),
        (Alone(1.0), 6.0, float("inf"), "loss is not finite"),
        (Alone(1.0, float("nan")), 6.0, 2.0, "parameters are not finite"),
        (Alone(1.0, float("inf")), 6.0, 2.0, "parameters are not finite"),
        (Alone(1.0, buffer=float("nan")), 6.0, 2.0, "buffers are not finite"),
        (Alone(1.0, buffer=float("-inf")), 6.0, 2.0, None),
    ],
)
def test_what_counts_as_diverged(ranks: Ranks, model: Any, first: float | None, last: float, reason: str | None) -> None:
    (said,) = ranks.run(1, judged, model, first, last)
    assert (said is None) == (reason is None) and (reason or "") in (said or "")


def judged(model: Any, first: float | None, last: float) -> str | None:
    class Here:
        device = torch.device("cpu")

    return divergence(model, Here(), first, last)  # pyright: ignore[reportArgumentType]


def test_a_number_that_json_has_no_word_for_is_none() -> None:
    assert [finite(value) for value in (1.5, float("nan"), float("inf"), 3, "x", None)] == [1.5, None, None, 3, "x", None]


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, text: Path) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "run", text, steps=4, optimizer={"lr": 1e300}, checkpoint={"every": 2, "at": "every"})
    assert not (tmp_path / "run" / "steps").exists()
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if event["event"] == "step left out"] == [2, 4]


def test_a_final_model_with_its_manifest_is_loaded_and_merged(tmp_path: Path, text: Path) -> None:
    """The manifest beside it disturbs nobody, and a merge sees by it that the file is still what was published."""
    directory = run(tmp_path, "run", text, steps=4, checkpoint={"every": 2, "at": "every"})
    AutoModelForCausalLM.from_pretrained(directory / "final")
    paths = {verdict.path: verdict.damaged for verdict in verify_run(directory)}
    assert paths == {
        "checkpoints/step-00000002": False, "checkpoints/step-00000004": False,
        "steps/step-00000002": False, "steps/step-00000004": False, "final": False,
    }  # fmt: skip
    inputs = ["--model", str(directory / "final"), "--model", str(directory / "steps" / "step-00000002")]
    assert main.run(["merge", "--method", "linear", *inputs, "--out", str(tmp_path / "merged")]) == 0
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    first, second = (load_file(Path(path) / "model.safetensors") for path in inputs[1::2])
    for name, tensor in merged.items():
        torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    weights = directory / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert {verdict.path for verdict in verify_run(directory) if verdict.damaged} == {"final"}
    outcome = command(["merge", "--method", "linear", *inputs, "--out", str(tmp_path / "again")])
    assert outcome.status == 2 and "does not have the XXH128" in outcome.stderr
    assert not (tmp_path / "again").exists()


def test_a_run_whose_directory_is_deleted_ends_in_one_line(tmp_path: Path, text: Path) -> None:
    def delete() -> None:
        record = tmp_path / "run" / "metrics.jsonl"
        jobs.wait_for(lambda: record.exists() and record.read_bytes().count(b"\n") > 3, "a few steps")
        shutil.rmtree(tmp_path / "run")

    thread = threading.Thread(target=delete)
    thread.start()
    with pytest.raises(UserError, match=r"cannot write .*run/.* deleted or moved while a run used it") as told:
        run(tmp_path, "run", text, steps=100_000, checkpoint={"every": 100, "at": "every"}, window={"every": 50})
    thread.join()
    assert "\n" not in str(told.value)
    assert not (tmp_path / "run").exists(), "its parts do not come back"
