"""Runs of every engine: resumed in the same layout to the same bytes, and in another layout to the same model."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distmerge.checkpoints.store import published_checkpoints
from distmerge.files.manifest import read_manifest
from tests import jobs
from tests.ranks import Outcome, Ranks, command

pytest.importorskip("deepspeed")

FAST = ("--steps", "12", "--train.gradient-accumulation", "1", "--evaluate.every", "6", "--evaluate.sequences", "3")


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Of our own, see test_matrix: ZeRO 3 always has four ranks here."""
    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jobs.write_config(tmp_path_factory.mktemp("runs"))


def start(pool: Ranks, world: int, *arguments: str) -> list[Outcome]:
    return pool.run(world, command, ["train", *arguments], group=False)


def train(pool: Ranks, world: int, *arguments: str) -> str:
    outcomes = start(pool, world, *arguments)
    said = "".join(outcome.stderr for outcome in outcomes)
    assert [outcome.status for outcome in outcomes] == [0] * world, said
    return said


def zero(stage: int, *more: str) -> tuple[str, ...]:
    return ("--engine.kind", "deepspeed", "--engine.config.zero_optimization.stage", str(stage), *more)


OFFLOAD = ("--engine.config.zero_optimization.offload_optimizer.device", "cpu")

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "fsdp, 2 x 2": (4, ("--engine.kind", "fsdp")),
    "fsdp, bfloat16": (
        2,
        ("--engine.kind", "fsdp", "--train.precision", "bfloat16", "--engine.reshard-after-forward", "false"),
    ),
    "zero 0": (2, zero(0)),
    "zero 1, 2 x 2": (4, zero(1)),
    "zero 2, bfloat16": (2, zero(2, "--train.precision", "bfloat16")),
    "zero 2, offload": (2, zero(2, *OFFLOAD)),
    "zero 3, 2 x 2": (4, zero(3)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_run_in_two_parts_is_the_run_in_one(pool: Ranks, config: str, tmp_path: Path, name: str) -> None:
    """Stopped in mid-round; the evaluation in between leaves every bit of theta as it was."""
    world, engine = LAYOUTS[name]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(pool, world, config, *FAST, *engine, "--run-dir", str(whole))
    train(pool, world, config, *FAST, *engine, "--run-dir", str(parts), "--steps", "8")
    first = jobs.final_bytes(parts)
    said = train(pool, world, config, *FAST, *engine, "--run-dir", str(parts))
    assert f"resuming from {parts}/checkpoints/step-00000008" in said
    assert jobs.final_bytes(parts) == jobs.final_bytes(whole) != first
    assert jobs.untimed(parts)[-1]["eval/loss"] == jobs.untimed(whole)[-1]["eval/loss"]


# ---- another layout

HALF = ("--train.batch-size", "1")


@pytest.fixture(scope="module")
def expected(pool: Ranks, config: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The model of a run that the torch engine takes from its beginning to its end, one rank a worker."""
    run = tmp_path_factory.mktemp("expected") / "run"
    train(pool, 2, config, *FAST, "--run-dir", str(run))
    return load_file(run / "final" / "model.safetensors")


CHANGES = {
    "torch 2 x 1 to torch 2 x 2": ((2, "torch", ()), (4, "torch", HALF)),
    "torch 2 x 1 to fsdp 2 x 2": ((2, "torch", ()), (4, "fsdp", HALF)),
    "fsdp 2 x 2 to torch 2 x 1": ((4, "fsdp", HALF), (2, "torch", ())),
    "fsdp 2 x 2 to fsdp 2 x 1": ((4, "fsdp", HALF), (2, "fsdp", ())),
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_layout_goes_on_with_the_same_run(
    pool: Ranks, config: str, tmp_path: Path, expected: dict[str, torch.Tensor], name: str
) -> None:
    run = tmp_path / "run"
    for steps, (world, engine, more) in zip(("8", "12"), CHANGES[name], strict=True):
        train(pool, world, config, *FAST, "--engine.kind", engine, *more, "--run-dir", str(run), "--steps", steps)
    newest = read_manifest(published_checkpoints(run / "checkpoints")[-1])
    assert (newest["world"], newest["engine"]) == CHANGES[name][1][:2]
    for key, tensor in load_file(run / "final" / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected[key], rtol=0, atol=1e-5)


REFUSED = {
    "deepspeed": (
        zero(1),
        (4, (*zero(1), *HALF)),
        "DeepSpeed's state can only be read by the same engine on the same number of ranks",
    ),
    "a larger step": ((), (4, ()), "must be 4, the sequences of a step in"),
    "sparta": (
        ("--merge.0.kind", "sparta"),
        (4, ("--merge.0.kind", "sparta", *HALF)),
        "merge[0] of kind sparta draws its indices from a rank's part of the model; resume in the same layout",
    ),
    "other workers": ((), (4, ("--mesh.workers", "4", *HALF)), "mesh.workers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_carried_over_is_refused(pool: Ranks, tmp_path: Path, name: str) -> None:
    first, (world, then), reason = REFUSED[name]
    text = jobs.CONFIG.replace("every = 7\nouter_momentum = 0.5\n", "every = 7\n")
    config = jobs.write_config(tmp_path, text)
    train(pool, 2, config, *FAST, *first, "--steps", "6")
    outcomes = start(pool, world, config, *FAST, *then)
    said = [line for outcome in outcomes for line in outcome.stderr.splitlines() if line.startswith("error")]
    assert [outcome.status for outcome in outcomes] == [2] * world
    assert len(said) == 1
    assert reason in said[0]


# ---- killed


def test_kill_and_resume_moves_no_bit(config: str, tmp_path: Path) -> None:
    """Real processes, a rank killed: what the runs in two parts show for every engine, for the one that hides most state."""
    engine = zero(2)
    arguments = ["train", config, "--steps", "24", "--train.gradient-accumulation", "1", "--run-dir"]
    whole = jobs.distmerge([*arguments, str(tmp_path / "whole"), *engine], tmp_path / "log-whole")
    assert whole.wait() == 0, whole.output
    killed = jobs.distmerge([*arguments, str(tmp_path / "run"), *engine], tmp_path / "log-killed")
    try:
        jobs.wait_for(lambda: jobs.last_step(tmp_path / "run") >= 8 or killed.process.poll() is not None, "step 8")
        jobs.kill(killed.ranks()[1], signal.SIGKILL)
        assert killed.wait() == 1, killed.output
    finally:
        killed.end()
    again = jobs.distmerge([*arguments, str(tmp_path / "run"), *engine], tmp_path / "log-again")
    assert again.wait() == 0, again.output
    assert "resuming from" in again.output
    assert jobs.final_bytes(tmp_path / "run") == jobs.final_bytes(tmp_path / "whole")
    assert jobs.untimed(tmp_path / "run") == jobs.untimed(tmp_path / "whole")
