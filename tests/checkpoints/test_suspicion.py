"""A suspicion holds what a run would later trust; what comes of it, for one worker and for several."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distmerge.checkpoints.store import published_checkpoints
from distmerge.config import toml
from distmerge.engine.engine import StepResult
from distmerge.engine.torch import TorchEngine
from distmerge.errors import UserError
from distmerge.launch.ranks import place
from distmerge.recovery.detector import Detector, Verdict
from distmerge.trainer.loop import train
from distmerge.windows.blocks import marks
from tests.checkpoints.runs import BASE, lines, parameters, run, same, write_text
from tests.ranks import Ranks

RECOVERY = {"enabled": True, "window": 16, "cool_down": 4, "margin": 2, "skip_batches": 0, "merge_last": 1}
SECTIONS: dict[str, Any] = {"window": {"every": 4, "blocks": 0}, "checkpoint": {"every": 4, "keep": 99}, "steps": 80}
SUSPECTED, DIVERGED, HEALTHY = Verdict("suspected", "s"), Verdict("diverged", "d"), Verdict("healthy")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


def report(patch: pytest.MonkeyPatch, factors: dict[int, float]) -> None:
    """The n-th engine step of this process reports a loss of 3 with a little noise, times a factor; theta is as it is."""
    real, seen = TorchEngine.train_step, 0

    def train_step(self: TorchEngine, batch: Tensor, lr: float) -> StepResult:
        nonlocal seen
        seen += 1
        result = real(self, batch, lr)
        loss = (3 + 0.03 * math.sin(seen * 2.4)) * factors.get(seen, 1.0)
        return StepResult(torch.tensor(loss), result.grad_norm * 0 + 1 + 0.1 * math.sin(seen * 1.7))

    patch.setattr(TorchEngine, "train_step", train_step)


def events(run_dir: Path, *kinds: str) -> list[dict[str, Any]]:
    return [event for event in lines(run_dir, "events.jsonl") if event["event"] in kinds]


def steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in published_checkpoints(run_dir / "checkpoints")]


def test_what_passes_is_held_and_released(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = run(tmp_path, "clean", text, **SECTIONS)
    report(monkeypatch, dict.fromkeys(range(42, 46), 1.4))
    watched = run(tmp_path, "watched", text, recovery=RECOVERY, **SECTIONS)
    assert not events(watched, "spike")
    first = events(watched, "suspected")[0]["step"]
    assert 42 <= first <= 44
    assert [event["step"] for event in events(watched, "checkpoint held")] == [44]
    held, released = events(watched, "block held"), events(watched, "blocks released")
    assert held[0]["block"] == "block-00000044"
    assert released[0]["blocks"] == [event["block"] for event in held]
    assert 44 not in steps(watched) and released[0]["step"] in steps(watched)  # the checkpoint that was owed
    assert not any(marks(watched / "window").values())
    assert same(parameters(clean / "final"), parameters(watched / "final"))


def test_what_goes_on_growing_is_gone_back_from_to_before_its_first_step(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = run(tmp_path, "clean", text, **SECTIONS)
    report(monkeypatch, {call: 1.1 ** (call - 40) for call in range(41, 75)})
    sick = run(tmp_path, "sick", text, recovery=RECOVERY, **SECTIONS)
    suspected, back = events(sick, "suspected")[0]["step"], events(sick, "rolled back")
    assert 41 <= suspected <= 45 and len(back) == 1
    assert back[0]["to"] == (suspected - 2 - 1) // 4 * 4
    spike = events(sick, "spike")[0]["step"]
    assert spike <= 75
    tainted = {path.name for path in sick.glob("*/*.tainted")}
    assert not any(f"step-{step:08}.tainted" in tainted for step in range(suspected, spike))  # none had been made
    assert not any(marks(sick / "window").values())
    assert same(parameters(clean / "final"), parameters(sick / "final"))


def test_a_new_level_is_accepted_and_what_was_held_is_released(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report(
        monkeypatch, dict.fromkeys(range(1, 13), 3.0) | dict.fromkeys(range(30, 35), 2.0) | dict.fromkeys(range(35, 200), 1.5)
    )
    moved = run(tmp_path, "moved", text, recovery=RECOVERY, **SECTIONS)
    assert not events(moved, "spike", "rolled back") and events(moved, "level accepted")
    assert events(moved, "block held") and events(moved, "blocks released")
    assert not any(marks(moved / "window").values())
    assert steps(moved)[-1] == 80


def scripted(patch: pytest.MonkeyPatch, verdicts: dict[int, Verdict]) -> list[str]:
    """The detector's verdict on the n-th step of this process; what it was told."""
    told: list[str] = []
    seen = 0

    def check(self: Detector, loss: float, grad_norm: float) -> Verdict:
        nonlocal seen
        seen += 1
        return verdicts.get(seen, HEALTHY)

    patch.setattr(Detector, "check", check)
    patch.setattr(Detector, "accept", lambda self: told.append("accept"))
    return told


def test_after_its_attempts_a_finite_spike_does_not_end_the_run(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scripted(monkeypatch, {22: DIVERGED, 26: DIVERGED, 40: DIVERGED})
    recovery = RECOVERY | {"attempts": 2}
    went_on = run(tmp_path, "on", text, recovery=recovery, **SECTIONS)
    assert [event["to"] for event in events(went_on, "rolled back")] == [16, 12]
    assert told == ["accept"]
    accepted = events(went_on, "level accepted")
    assert len(accepted) == 1 and "the run goes on" in accepted[0]["action"]
    assert lines(went_on, "metrics.jsonl")[-1]["step"] == 80


def test_a_loss_that_goes_on_growing_ends_the_run(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, {22: DIVERGED, 40: DIVERGED, 60: DIVERGED})
    with pytest.raises(UserError, match="after its level had been accepted"):
        run(tmp_path, "ended", text, recovery=RECOVERY | {"attempts": 1}, **SECTIONS)


def train_two(folder: Path, name: str, verdicts: dict[int, dict[int, Verdict]], sections: dict[str, Any]) -> None:
    """In a rank: train; rank r's detector says ``verdicts[r]`` of its steps."""
    table = BASE | {"run_dir": str(folder / name), "mesh": {"device": "cpu", "workers": 2}, "recovery": RECOVERY} | sections
    table["data"] = BASE["data"] | {"files": [str(folder / "text.txt")]}
    here = place()
    assert here is not None
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, verdicts.get(here.rank, {}))
        train(toml.validate(table), here, ["test"])


MERGES = {
    "average": [{"kind": "average", "every": 6}],
    "diloco": [{"kind": "diloco", "every": 4, "outer_momentum": 0.5}],
    "sparta": [{"kind": "sparta", "fraction": 0.1, "every": 3, "delay": 2}],
}


@pytest.mark.parametrize("kind", MERGES)
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_what_one_worker_suspects_is_held_by_all(ranks: Ranks, text: Path, kind: str, asynchronous: bool) -> None:
    folder, name = text.parent, f"held-{kind}-{asynchronous}"
    sections = SECTIONS | {"merge": MERGES[kind], "steps": 24, "checkpoint": {"every": 4, "keep": 99, "async": asynchronous}}
    ranks.run(2, train_two, folder, name, {1: dict.fromkeys(range(7, 10), SUSPECTED)}, sections, group=False, seconds=600)
    assert [event["step"] for event in events(folder / name, "checkpoint held")] == [8]
    assert [event["block"] for event in events(folder / name, "block held")] == ["block-00000008"]
    assert [event["blocks"] for event in events(folder / name, "blocks released")] == [["block-00000008"]]
    assert not any(marks(folder / name / "window").values())
    assert 8 not in steps(folder / name) and {4, 12, 16, 20, 24} <= set(steps(folder / name))
    assert not events(folder / name, "sick worker", "spike")


@pytest.mark.parametrize("kind", MERGES)
def test_a_worker_that_diverges_taints_what_was_held_for_it(ranks: Ranks, text: Path, kind: str) -> None:
    folder, name = text.parent, f"diverges-{kind}"
    sections = SECTIONS | {"merge": MERGES[kind], "steps": 24}
    verdicts = dict.fromkeys(range(7, 10), SUSPECTED) | {10: Verdict("diverged", "grew", 3)}
    ranks.run(2, train_two, folder, name, {1: verdicts}, sections, group=False, seconds=600)
    assert [event["workers"] for event in events(folder / name, "sick worker")] == [[1]]
    assert "block-00000008" in events(folder / name, "blocks tainted")[0]["blocks"]
    assert marks(folder / name / "window")["block-00000008"]
    assert not events(folder / name, "blocks released", "spike")
    assert 8 not in steps(folder / name)


def test_most_workers_with_a_finite_spike_go_on_together(ranks: Ranks, text: Path) -> None:
    folder = text.parent
    sections = SECTIONS | {"merge": MERGES["diloco"], "steps": 32, "recovery": RECOVERY | {"attempts": 1}}
    verdicts = {0: {14: DIVERGED, 30: DIVERGED}, 1: {13: DIVERGED, 29: DIVERGED}}
    ranks.run(2, train_two, folder, "most", verdicts, sections, group=False, seconds=600)
    assert [event["to"] for event in events(folder / "most", "rolled back")] == [8]
    assert len(events(folder / "most", "level accepted")) == 1
    assert lines(folder / "most", "metrics.jsonl")[-1]["step"] == 32
