"""Nothing that is not finite is merged, committed or gone back to: faults that the step's own loss does not show."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distmerge.checkpoints.health import not_finite, unsound, unsound_checkpoint
from distmerge.checkpoints.store import published_checkpoints
from distmerge.config import toml
from distmerge.engine.engine import StepResult
from distmerge.engine.torch import TorchEngine
from distmerge.errors import UserError
from distmerge.launch.ranks import DIVERGED, place
from distmerge.trainer.loop import train
from tests.checkpoints.runs import BASE, lines, parameters, run, same, write_text
from tests.ranks import Ranks

RECOVERY = {"enabled": True, "window": 16, "cool_down": 5, "margin": 2, "skip_batches": 0, "merge_last": 1}
AVERAGE = {"kind": "average", "every": 5}
DILOCO = {"kind": "diloco", "every": 5, "outer_momentum": 0.5}
STREAMING = DILOCO | {"overlap": 2, "wire": "int4", "error_feedback": True, "mix": 0.5}
SPARTA = {"kind": "sparta", "fraction": 0.1, "every": 1, "selector": "shuffled"}
DELAYED = SPARTA | {"delay": 4}
SMOOTHED = DELAYED | {"ema": 0.5}
SHARDED = DILOCO | {"outer_sharded": True}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def spoil_updates(patch: pytest.MonkeyPatch, calls: set[int], of: str = "theta") -> None:
    """After the n-th engine steps of this process theta, or the moments, are NaN, though loss and gradients were finite."""
    real, seen = TorchEngine.train_step, 0

    def train_step(self: TorchEngine, batch: Tensor, lr: float) -> StepResult:
        nonlocal seen
        seen += 1
        result = real(self, batch, lr)
        if seen in calls and of == "theta":
            self.parameters.whole[7] = math.nan
        if seen in calls and of == "moments":
            next(iter(self.optimizers[0].state.values()))["exp_avg"].fill_(math.nan)
        return result

    patch.setattr(TorchEngine, "train_step", train_step)


def train_two(folder: Path, name: str, spoiled: dict[int, set[int]], sections: dict[str, Any]) -> None:
    """In a rank: train; rank r's update is NaN at its engine steps ``spoiled[r]``."""
    table = BASE | {"run_dir": str(folder / name), "mesh": {"device": "cpu", "workers": 2}} | sections
    table["data"] = BASE["data"] | {"files": [str(folder / "text.txt")]}
    here = place()
    assert here is not None
    with pytest.MonkeyPatch.context() as patch:
        spoil_updates(patch, spoiled.get(here.rank, set()))
        train(toml.validate(table), here, ["test"])


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run_dir, "events.jsonl") if event["event"] == kind]


def all_finite(directory: Path) -> bool:
    checkpoints = published_checkpoints(directory / "checkpoints")
    assert len(checkpoints) > 1
    kept = [unsound_checkpoint(path) for path in checkpoints]
    return kept == [None] * len(checkpoints) and not_finite(parameters(directory / "final")) is None


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_nan_in_the_update_of_a_step_that_commits_is_not_committed(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    checkpoint = BASE["checkpoint"] | {"async": asynchronous}
    clean = run(tmp_path, "clean", text, checkpoint=checkpoint)
    spoil_updates(monkeypatch, {20})
    sick = run(tmp_path, "sick", text, recovery=RECOVERY, checkpoint=checkpoint, window={"every": 10})
    assert [(event["step"], event["to"]) for event in events(sick, "rolled back")] == [(10, 10)]
    assert "not finite" in events(sick, "spike")[0]["reason"]
    assert all_finite(sick)
    assert not_finite(parameters(sick / "window/block-00000020")) is None
    assert same(parameters(clean / "final"), parameters(sick / "final"))


@pytest.mark.parametrize(
    "merge",
    [[AVERAGE], [DILOCO], [STREAMING], [SPARTA], [DELAYED], [SMOOTHED], [SHARDED], [SMOOTHED, STREAMING]],
    ids=["average", "diloco", "streaming", "sparta", "delayed", "smoothed", "sharded", "both"],
)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_nan_in_the_update_of_a_merge_step_reaches_nobody(
    ranks: Ranks, text: Path, merge: list[dict[str, Any]], rank: int
) -> None:
    """Step 15 merges and neither commits nor ends a block; step 20 does all three."""
    name = f"merge-{merge[0].get('kind')}-{len(merge)}-{sorted(merge[0])}-{rank}".replace("'", "")
    sections = {"merge": merge, "recovery": RECOVERY, "window": {"every": 10}, "steps": 30}
    ranks.run(2, train_two, text.parent, name, {rank: {15, 20}}, sections, group=False, seconds=600)
    directory = text.parent / name
    told = events(directory, "sick worker")
    assert [(event["step"], event["workers"]) for event in told] == [(15, [rank]), (20, [rank])]
    assert all("not finite" in event["reason"] for event in told)
    assert not events(directory, "spike") and not events(directory, "checkpoint left out")
    assert all_finite(directory)
    assert all(math.isfinite(line["eval/loss"]) for line in lines(directory, "metrics.jsonl") if "eval/loss" in line)


@pytest.mark.parametrize("merge", [[AVERAGE], [DILOCO]], ids=["average", "diloco"])
def test_a_nan_on_one_rank_of_a_worker_is_the_whole_workers(ranks: Ranks, text: Path, merge: list[dict[str, Any]]) -> None:
    name = f"ranks-{merge[0]['kind']}"
    sections = {"merge": merge, "recovery": RECOVERY, "steps": 20, "checkpoint": {"every": 5}}
    ranks.run(4, train_two, text.parent, name, {2: {15}}, sections, group=False, seconds=600)
    told = events(text.parent / name, "sick worker")
    assert [(event["step"], event["workers"]) for event in told] == [(15, [1])]
    assert all_finite(text.parent / name)


def test_a_sick_worker_does_not_count_at_the_end(ranks: Ranks, text: Path) -> None:
    sections = {"merge": [{"kind": "none"}], "recovery": RECOVERY, "steps": 20, "checkpoint": {"every": 100}}
    ranks.run(2, train_two, text.parent, "end", {1: {17}}, sections, group=False, seconds=600)
    assert [event["step"] for event in events(text.parent / "end", "sick worker")] == [20]
    assert not_finite(parameters(text.parent / "end/final")) is None


def test_both_workers_go_back_with_a_merge_in_flight(ranks: Ranks, text: Path) -> None:
    """Checkpoints of steps 10 and 5 are merged at 10, where a fragment and rounds are in flight, and so not of theta."""
    sections = {
        "merge": [SMOOTHED, STREAMING | {"every": 8, "overlap": 4}],
        "recovery": RECOVERY | {"merge_last": 2},
        "checkpoint": {"every": 5, "keep": 9},
    }
    ranks.run(2, train_two, text.parent, "flight", {0: {13}, 1: {13}}, sections, group=False, seconds=600)
    directory = text.parent / "flight"
    assert [event["to"] for event in events(directory, "merged and rolled back")] == [10]
    assert all_finite(directory)


def test_a_checkpoint_that_is_not_finite_is_rejected_by_name(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that was made before such were refused, or by a hand: its hashes are right."""
    monkeypatch.setattr("distmerge.trainer.run.unsound", lambda files: None)
    spoil_updates(monkeypatch, {20}, of="moments")
    sick = run(tmp_path, "sick", text, recovery=RECOVERY | {"margin": 0})
    rejected = events(sick, "rejected checkpoint")
    assert [Path(event["path"]).name for event in rejected] == ["step-00000020"]
    assert "optimizer-00000.pt" in rejected[0]["reason"] and "exp_avg" in rejected[0]["reason"]
    assert [event["to"] for event in events(sick, "rolled back")] == [10]
    assert all_finite(sick)


def test_without_recovery_what_is_not_finite_takes_no_checkpoints_place(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_updates(monkeypatch, {25})
    with pytest.raises(SystemExit) as end:
        run(tmp_path, "sick", text, checkpoint={"every": 10, "keep": 2})
    sick = tmp_path / "sick"
    assert end.value.code == DIVERGED and not (sick / "final").exists()
    names = [path.name for path in published_checkpoints(sick / "checkpoints")]
    assert names == ["step-00000010", "step-00000020"]
    assert {event["step"] for event in events(sick, "checkpoint left out")} == {30, 40}


def test_each_attempt_goes_further_back(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_updates(monkeypatch, set(range(33, 100)))
    with pytest.raises(UserError, match="3 roll-backs did not help"):
        run(tmp_path, "sick", text, recovery=RECOVERY, checkpoint={"every": 5, "keep": 4})
    assert [event["to"] for event in events(tmp_path / "sick", "rolled back")] == [30, 25, 20]


def test_what_is_looked_at_and_what_is_not() -> None:
    nan, inf = torch.full((2,), math.nan), torch.tensor([1.0, math.inf])
    assert unsound([("parameters-00000.safetensors", {"a": inf})]) == (
        "parameters-00000.safetensors: a holds values that are not finite"
    )
    assert unsound([("parameters-00000.safetensors", {"buffer:mask": inf, "a": torch.full((3,), 3e38)})]) is None
    assert unsound([("parameters-00000.safetensors", {"buffer:mean": nan})]) is not None
    assert unsound([("optimizer-00000.pt", [{"state": {0: {"exp_avg": nan, "step": torch.tensor(1)}}}])]) == (
        "optimizer-00000.pt: 0.state.0.exp_avg holds values that are not finite"
    )
    state = {"window": {"mean": nan}, "mergers": [{"outer": {"velocity": torch.zeros(2)}}]}
    assert unsound([("rank-00000.pt", state)]) is None
    state["mergers"][0]["outer"]["velocity"] = inf
    assert "mergers.0.outer.velocity" in str(unsound([("rank-00000.pt", state)]))
