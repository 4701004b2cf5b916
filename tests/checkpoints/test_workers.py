"""Time and space together: blocks of several workers, a sick worker among well ones, roll-backs of all."""

from __future__ import annotations

import json
import math
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from distmerge.checkpoints.verify import verify_run
from distmerge.cli import main
from distmerge.config import toml
from distmerge.engine.engine import StepResult
from distmerge.engine.torch import TorchEngine
from distmerge.errors import UserError
from distmerge.launch.ranks import place
from distmerge.trainer.loop import train
from distmerge.windows.blocks import published_blocks, read_block, stable_blocks
from tests.checkpoints.runs import BASE, forget_after, lines, parameters, same, write_text
from tests.ranks import Ranks

DILOCO = [{"kind": "diloco", "every": 5, "outer_momentum": 0.5}]
AVERAGE = [{"kind": "average", "every": 5}]
RECOVERY = {"enabled": True, "window": 16, "cool_down": 5, "margin": 2, "skip_batches": 0, "merge_last": 2}
WINDOW = {"every": 10, "blocks": 0}


def train_two(folder: Path, name: str, sick_at: dict[int, int], sections: dict[str, Any]) -> None:
    """In a rank: train, while rank r turns to NaN at its engine step ``sick_at[r]``."""
    table = BASE | {"run_dir": str(folder / name), "mesh": {"device": "cpu", "workers": 2}} | sections
    table["data"] = BASE["data"] | {"files": [str(folder / "text.txt")]}
    here = place()
    assert here is not None
    real, steps = TorchEngine.train_step, 0

    def train_step(self: TorchEngine, batch: torch.Tensor, lr: float) -> StepResult:
        nonlocal steps
        steps += 1
        result = real(self, batch, lr)
        if steps == sick_at.get(here.rank):
            self.parameters.whole.fill_(math.nan)
            return StepResult(result.loss * math.nan, result.grad_norm * math.nan)
        return result

    TorchEngine.train_step = train_step
    try:
        train(toml.validate(table), here, ["test"])
    finally:
        TorchEngine.train_step = real


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_text(folder)
    return folder


def run(ranks: Ranks, folder: Path, name: str, sick_at: dict[int, int] | None = None, **sections: Any) -> Path:
    ranks.run(2, train_two, folder, name, sick_at or {}, sections, group=False)
    return folder / name


def events(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run_dir, "events.jsonl") if event["event"] == kind]


def rank_state(run_dir: Path, step: int) -> dict[str, Any]:
    return torch.load(run_dir / f"checkpoints/step-{step:08}/rank-00000.pt", weights_only=True)


def test_with_an_anchor_a_block_is_the_mean_of_the_anchors(ranks: Ranks, folder: Path) -> None:
    directory = run(ranks, folder, "anchors", merge=DILOCO, window=WINDOW, checkpoint={"every": 5, "keep": 8})
    anchors = [rank_state(directory, step)["mergers"][0]["outer"]["anchor"] for step in (15, 20)]
    block = parameters(directory / "window/block-00000020")
    saved = load_file(directory / "checkpoints/step-00000020/parameters-00000.safetensors")
    offset = 0
    for name in (name for name in anchor_order(directory) if name in saved):
        part = slice(offset, offset + saved[name].numel())
        mean = (anchors[0][part] + anchors[1][part]).view(saved[name].shape) / 2
        offset = part.stop
        if name in block:
            torch.testing.assert_close(block[name], mean)


def anchor_order(directory: Path) -> list[str]:
    """The parameters' order in the flat vector: the model's own."""
    from transformers import AutoModelForCausalLM

    return [name for name, _ in AutoModelForCausalLM.from_pretrained(directory / "final").named_parameters()]


def test_without_an_anchor_a_block_is_the_mean_over_workers_and_time(ranks: Ranks, folder: Path) -> None:
    directory = run(ranks, folder, "means", merge=AVERAGE, window=WINDOW, checkpoint={"every": 1, "keep": 40})
    block = parameters(directory / "window/block-00000020")
    for name, tensor in block.items():
        states = [
            load_file(directory / f"checkpoints/step-{step:08}/parameters-{worker:05}.safetensors")[name].double()
            for step in range(11, 21)
            for worker in range(2)
        ]
        torch.testing.assert_close(tensor.double(), torch.stack(states).mean(0), rtol=1e-5, atol=1e-6)


def test_a_resume_inside_a_block_changes_no_bit(ranks: Ranks, folder: Path) -> None:
    sections: dict[str, Any] = {"merge": DILOCO, "window": WINDOW, "checkpoint": {"every": 1, "keep": 40, "async": True}}
    whole = run(ranks, folder, "whole", **sections)
    resumed = run(ranks, folder, "resumed", **sections)
    forget_after(resumed, 17)
    run(ranks, folder, "resumed", **sections)
    for end in (10, 20, 30, 40):
        assert same(parameters(whole / f"window/block-{end:08}"), parameters(resumed / f"window/block-{end:08}"))
    assert same(parameters(whole / "final"), parameters(resumed / "final"))


@pytest.mark.parametrize("merge", [DILOCO, AVERAGE, [{"kind": "sparta", "fraction": 0.1, "every": 2}]])
def test_a_sick_worker_leaves_the_merge_and_starts_again(ranks: Ranks, folder: Path, merge: list[dict[str, Any]]) -> None:
    name = f"sick-{merge[0]['kind']}"
    directory = run(ranks, folder, name, {1: 23}, merge=merge, window=WINDOW, recovery=RECOVERY)
    sick = events(directory, "sick worker")
    assert len(sick) == 1 and sick[0]["workers"] == [1] and "nan" in sick[0]["reason"]
    assert not events(directory, "rolled back") and not events(directory, "merged and rolled back")
    assert all(torch.isfinite(tensor).all() for tensor in parameters(directory / "final").values())
    assert math.isfinite(lines(directory, "metrics.jsonl")[-1]["eval/loss"])
    dropped = [event["block"] for event in events(directory, "block dropped")]
    assert dropped == ([] if merge is DILOCO else ["block-00000030"])  # anchors have never seen the sick values


def test_a_published_block_that_a_spike_touched_is_marked_and_stays_so(ranks: Ranks, folder: Path) -> None:
    sections: dict[str, Any] = {"merge": AVERAGE, "window": WINDOW, "recovery": RECOVERY, "preview": {"every": 10, "last": 5}}
    directory = run(ranks, folder, "touched", {1: 22}, **sections)  # found at 22, it may have begun at 20
    marked = [event["blocks"] for event in events(directory, "blocks tainted")]
    assert marked == [["block-00000020"]]
    records = {path.name: read_block(path).tainted for path in published_blocks(directory / "window")}
    assert records == {"block-00000010": False, "block-00000020": True, "block-00000040": False}
    assert not any(verdict.damaged for verdict in verify_run(directory))
    assert stable_blocks(directory / "window", 9, 40) == ["block-00000040", "block-00000010"]
    assert main.run(["window", str(directory), "--curve", "mean", "--out", str(folder / "untouched")]) == 0
    weights = json.loads((folder / "untouched/merge.json").read_text())["weights"]
    assert [Path(name).name for name in weights] == ["block-00000010", "block-00000040"]
    with pytest.raises(UserError, match="block-00000020 is tainted"):
        main.run(["window", *(str(directory / "window" / name) for name in records), "--out", str(folder / "none")])
    forget_after(directory, 20)  # that state was saved before the spike
    run(ranks, folder, "touched", **sections)
    blocks = rank_state(directory, 40)["window"]["blocks"]
    assert [block["tainted"] for block in blocks] == [False, True, False, False]


def test_a_sick_worker_taints_every_block_until_the_merge(ranks: Ranks, folder: Path) -> None:
    sections: dict[str, Any] = {
        "merge": [{"kind": "average", "every": 20}],
        "window": WINDOW,
        "recovery": RECOVERY,
        "checkpoint": {"every": 20},
    }
    directory = run(ranks, folder, "long", {1: 25}, **sections)
    assert [event["block"] for event in events(directory, "block dropped")] == ["block-00000030", "block-00000040"]


def test_most_workers_sick_is_the_runs_spike(ranks: Ranks, folder: Path) -> None:
    directory = run(ranks, folder, "most", {0: 23, 1: 24}, merge=DILOCO, recovery=RECOVERY)
    assert events(directory, "merged and rolled back")[0]["merged"] == ["step-00000020", "step-00000010"]
    assert all(torch.isfinite(tensor).all() for tensor in parameters(directory / "final").values())
    assert lines(directory, "metrics.jsonl")[-1]["step"] == 40


def test_a_plain_roll_back_of_workers_is_the_clean_run(ranks: Ranks, folder: Path) -> None:
    clean = run(ranks, folder, "clean", merge=DILOCO)
    sick = run(ranks, folder, "plain", {0: 23, 1: 23}, merge=DILOCO, recovery=RECOVERY | {"merge_last": 1})
    assert events(sick, "rolled back")[0]["to"] == 20
    assert same(parameters(clean / "final"), parameters(sick / "final"))


def test_a_block_shorter_than_the_merge_interval_is_refused(ranks: Ranks, folder: Path) -> None:
    with pytest.raises(BaseException) as caught:
        run(ranks, folder, "short", merge=DILOCO, window={"every": 4})
    told = "".join(traceback.format_exception(caught.value))
    assert "config.window.every must be >= 5" in told
