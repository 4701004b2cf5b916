"""Recovery in a run: what is merged where, what becomes of the moments, and that a killed roll-back is finished."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from distmerge.engine.engine import StepResult
from distmerge.engine.torch import TorchEngine
from distmerge.errors import UserError
from distmerge.files.directories import verify
from distmerge.recovery.plan import Plan, finish_tainting, read_plan, write_plan
from distmerge.recovery.response import Recovery
from distmerge.recovery.rollback import RollBack
from distmerge.windows.blocks import marks, read_block
from tests.checkpoints.runs import forget_after, lines, parameters, run, same, write_text

RECOVERY = {"enabled": True, "window": 16, "cool_down": 5, "margin": 2, "skip_batches": 4, "merge_last": 2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def nan_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The gradient of the n-th engine step of the process is NaN, and so is everything after it."""
    real = TorchEngine.train_step

    def arm(*calls: int) -> list[torch.Tensor]:
        seen: list[torch.Tensor] = []

        def train_step(self: TorchEngine, batch: torch.Tensor, lr: float) -> StepResult:
            seen.append(batch)
            result = real(self, batch, lr)
            if len(seen) in calls:
                self.parameters.whole.fill_(math.nan)
                for optimizer in self.optimizers:
                    for moments in optimizer.state.values():
                        moments["exp_avg"].fill_(math.nan)
                return StepResult(result.loss * math.nan, result.grad_norm * math.nan)
            return result

        monkeypatch.setattr(TorchEngine, "train_step", train_step)
        return seen

    return arm


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run_dir, "events.jsonl") if event["event"] == kind]


def test_merges_the_stable_checkpoints_and_leaves_out_the_batches(tmp_path: Path, text: Path, nan_at: Any) -> None:
    clean = run(tmp_path, "clean", text)
    batches = nan_at(35)
    merged: list[dict[str, torch.Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        real = RollBack._merge

        def spying(self: RollBack, members: list[str]) -> None:
            real(self, members)
            merged.append({name: view.clone() for name, view in self.run.engine.parameters.named_views()})

        patch.setattr(RollBack, "_merge", spying)
        sick = run(tmp_path, "sick", text, recovery=RECOVERY)
    states = [load_file(clean / f"checkpoints/step-{step:08}/parameters-00000.safetensors") for step in (20, 30)]
    for name, view in merged[0].items():
        torch.testing.assert_close(view, (states[0][name] + states[1][name]) / 2)
    event = events(sick, "merged and rolled back")[0]
    assert event["to"] == 30 and event["merged"] == ["step-00000030", "step-00000020"]
    assert "nan" in events(sick, "spike")[0]["reason"]
    # steps 31..35 took batches 30..34; 32..35 are left out, so the second time they are 30, 31, 36, ...
    again = batches[35:]
    assert torch.equal(again[0], batches[30]) and torch.equal(again[1], batches[31])
    assert not any(torch.equal(batch, left_out) for batch in again for left_out in batches[32:35])
    assert all(torch.isfinite(tensor).all() for tensor in parameters(sick / "final").values())
    assert lines(sick, "metrics.jsonl")[-1]["step"] == 40


@pytest.mark.parametrize("optimizer", ["keep", "reset", "average", "rollback"])
def test_every_way_with_the_moments_goes_on(tmp_path: Path, text: Path, nan_at: Any, optimizer: str) -> None:
    nan_at(35)
    sick = run(tmp_path, "sick", text, recovery=RECOVERY | {"keep_optimizer": optimizer})
    said = events(sick, "merged and rolled back")[0]["optimizer"]
    assert said.startswith(optimizer) and (optimizer != "keep" or "reset" in said)
    assert math.isfinite(lines(sick, "metrics.jsonl")[-1]["eval/loss"])


def test_a_plain_roll_back_that_skips_nothing_is_the_clean_run(tmp_path: Path, text: Path, nan_at: Any) -> None:
    clean = run(tmp_path, "clean", text, window={"every": 8})
    nan_at(35)
    recovery = RECOVERY | {"merge_last": 1, "skip_batches": 0}
    sick = run(tmp_path, "sick", text, recovery=recovery, window={"every": 8})
    assert events(sick, "rolled back")[0]["to"] == 30
    assert same(parameters(clean / "final"), parameters(sick / "final"))
    assert same(parameters(clean / "window/block-00000040"), parameters(sick / "window/block-00000040"))


def test_blocks_are_merged_where_there_are_enough(tmp_path: Path, text: Path, nan_at: Any) -> None:
    nan_at(35)
    sick = run(tmp_path, "sick", text, recovery=RECOVERY, window={"every": 8})
    assert events(sick, "merged and rolled back")[0]["merged"] == ["block-00000024", "block-00000016"]


def test_a_damaged_block_is_not_merged(tmp_path: Path, text: Path, nan_at: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Recovery.roll_back

    def flip_then_roll_back(self: Recovery, step: int) -> bool:
        file = tmp_path / "flipped/window/block-00000020/model.safetensors"
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
        return real(self, step)

    monkeypatch.setattr(Recovery, "roll_back", flip_then_roll_back)
    nan_at(35)
    directory = run(tmp_path, "flipped", text, recovery=RECOVERY, window={"every": 10, "blocks": 2})
    assert events(directory, "merged and rolled back")[0]["merged"] == ["step-00000030", "step-00000020"]


def test_a_killed_roll_back_is_finished_by_the_next_start(tmp_path: Path, text: Path, nan_at: Any) -> None:
    nan_at(35)
    whole = run(tmp_path, "whole", text, recovery=RECOVERY)
    killed = tmp_path / "killed"
    nan_at(35)
    with pytest.MonkeyPatch.context() as patch:

        def die(self: RollBack, plan: Any, kept: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(RollBack, "carry_out", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "killed", text, recovery=RECOVERY)
    nan_at()
    run(tmp_path, "killed", text, recovery=RECOVERY)
    assert same(parameters(whole / "final"), parameters(killed / "final"))
    # and once the run is past the plan's checkpoint, a resume does not go back again
    forget_after(killed, 40)
    shutil.rmtree(killed / "final")
    run(tmp_path, "killed", text, recovery=RECOVERY)
    assert len(events(killed, "merged and rolled back")) == 1
    assert same(parameters(whole / "final"), parameters(killed / "final"))


def test_newer_checkpoints_and_blocks_are_tainted(tmp_path: Path, text: Path, nan_at: Any) -> None:
    nan_at(21)  # the checkpoint of step 20 is younger than the margin
    sick = run(tmp_path, "sick", text, recovery=RECOVERY, window={"every": 5})
    assert events(sick, "merged and rolled back")[0]["to"] == 10
    assert events(sick, "blocks tainted")[0]["blocks"] == ["block-00000015", "block-00000020"]
    for name in ("block-00000015", "block-00000020"):  # given up as they were; the new course has published its own
        assert read_block(sick / f"window/{name}.tainted").tainted and not read_block(sick / "window" / name).tainted
        assert verify(sick / "window" / name, name="block.json") is None
    assert (sick / "checkpoints/step-00000020.tainted").is_dir()
    assert (sick / "checkpoints/step-00000020").is_dir()
    plan = read_plan(sick)
    assert plan is not None and not plan.tainted


def test_a_killed_tainting_is_finished(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = run(tmp_path, "run", text, window={"every": 8, "blocks": 0})

    def die(path: Path, why: str) -> Path:
        raise KeyboardInterrupt

    planned = Plan(to=20, members=["step-00000020"], optimizer="rollback", spike=0, attempts=0, skipped=[])
    with monkeypatch.context() as patch:
        patch.setattr("distmerge.recovery.plan.set_aside", die)
        with pytest.raises(KeyboardInterrupt):
            write_plan(directory, planned)
    plan = read_plan(directory)
    assert plan is not None and plan == planned and plan.tainted
    finish_tainting(directory, plan)
    finished = read_plan(directory)
    assert finished is not None and not finished.tainted
    aside = sorted(path.name for path in directory.glob("*/*.tainted"))
    assert aside == [f"block-000000{end}.tainted" for end in (24, 32, 40)] + [f"step-000000{end}.tainted" for end in (30, 40)]
    assert all(read_block(directory / "window" / name).tainted for name in aside[:3])
    assert marks(directory / "window") == {"block-00000008": False, "block-00000016": False}


def test_stops_after_its_attempts_and_says_so(tmp_path: Path, text: Path, nan_at: Any) -> None:
    nan_at(*range(15, 1000))
    with pytest.raises(UserError, match="2 roll-backs did not help") as caught:
        run(tmp_path, "sick", text, recovery=RECOVERY | {"attempts": 2}, checkpoint={"every": 5, "keep": 4})
    assert "\n" not in str(caught.value)
    assert [event["attempt"] for event in events(tmp_path / "sick", "spike")] == [1, 2, 3]


def test_a_lower_rate_until_the_spike_and_the_cool_down_are_past(tmp_path: Path, text: Path, nan_at: Any) -> None:
    nan_at(25)
    recovery = RECOVERY | {"lr_factor": 0.5, "cool_down": 6, "merge_last": 1}
    directory = run(tmp_path, "slower", text, recovery=recovery)
    rates = {line["step"]: line["lr"] for line in lines(directory, "metrics.jsonl") if "lr" in line}
    assert events(directory, "rolled back")[0]["to"] == 20
    assert [step for step, rate in rates.items() if rate == pytest.approx(2e-3)] == list(range(21, 32))  # 25 + 6


def test_every_decision_is_a_text_in_tensorboard(tmp_path: Path, text: Path, nan_at: Any) -> None:
    nan_at(25)
    directory = run(tmp_path, "told", text, recovery=RECOVERY | {"merge_last": 1}, window={"every": 8})
    with open(directory / "events.jsonl", "a") as file:
        file.write('{"time": "torn by a cra')
    forget_after(directory, 30)
    run(tmp_path, "told", text, recovery=RECOVERY | {"merge_last": 1}, window={"every": 8})
    board = EventAccumulator(str(directory / "tensorboard"), {"tensors": 0}).Reload()
    told = {tag.split("/")[1] for tag in board.Tags()["tensors"]}
    assert (
        told
        == {"spike", "rolled back", "block", "blocks tainted"}
        == {line["event"] for line in lines(directory, "events.jsonl")}
    ), told


def test_before_the_first_checkpoint_it_goes_back_to_the_start(tmp_path: Path, text: Path, nan_at: Any) -> None:
    clean = run(tmp_path, "clean", text)
    nan_at(3)
    sick = run(tmp_path, "sick", text, recovery=RECOVERY | {"margin": 5, "skip_batches": 0, "merge_last": 1})
    assert [event["to"] for event in events(sick, "rolled back")] == [0]
    assert same(parameters(clean / "final"), parameters(sick / "final"))
    assert [line["step"] for line in lines(sick, "metrics.jsonl")].count(0) == 1


def test_watching_changes_no_bit(tmp_path: Path, text: Path) -> None:
    clean = run(tmp_path, "clean", text)
    watched = run(tmp_path, "watched", text, recovery=RECOVERY | {"threshold": 20.0})
    assert same(parameters(clean / "final"), parameters(watched / "final"))
    assert not events(watched, "spike")
