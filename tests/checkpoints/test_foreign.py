"""Checkpoints of others' trainers as members of a window: DCP directories, DeepSpeed's of ZeRO stages 2 and 3."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from distmerge.cli import main
from distmerge.errors import UserError

ZERO = Path(__file__).parent / "zero"
SHAPES = {"0.weight": (5, 8), "0.bias": (5,), "1.weight": (3, 5)}


def window(*arguments: object) -> None:
    assert main.run(["window", *map(str, arguments)]) == 0


def masters(tag: Path, stage: int) -> dict[str, torch.Tensor]:
    """The float32 parameters, put together from the ranks' partitions by hand.

    Stage 2 partitions all parameters as one padded vector, stage 3 each parameter on its own.
    """
    parts = []
    for rank in (0, 1):
        (file,) = tag.glob(f"*zero_pp_rank_{rank}_*optim_states.pt")
        state = torch.load(file, map_location="cpu", weights_only=False)["optimizer_state_dict"]
        parts.append(state["single_partition_of_fp32_groups" if stage == 2 else "fp32_flat_groups"][0])
    numels = [torch.Size(shape).numel() for shape in SHAPES.values()]
    if stage == 2:
        pieces = torch.cat(parts)[: sum(numels)].split(numels)
    else:
        sizes = [-(-numel // 2) for numel in numels]
        halves = [part[: sum(sizes)].split(sizes) for part in parts]
        pieces = [torch.cat(pair)[:numel] for *pair, numel in zip(*halves, numels, strict=True)]
    return {name: piece.view(shape) for (name, shape), piece in zip(SHAPES.items(), pieces, strict=True)}


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_checkpoints_are_members(tmp_path: Path, stage: int, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("deepspeed")
    run = shutil.copytree(ZERO / f"stage{stage}", tmp_path / "run")
    tags = [run / "global_step1", run / "global_step2"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="--allow-pickle"):
        window(*tags, "--out", tmp_path / "merged")
    window(*tags, "--curve", "mean", "--allow-pickle", "--out", tmp_path / "merged")
    assert "Processing zero checkpoint" not in capsys.readouterr().out
    merged, (one, two) = load_file(tmp_path / "merged/model.safetensors"), (masters(tag, stage) for tag in tags)
    assert merged.keys() == SHAPES.keys()
    for name in SHAPES:
        assert not torch.equal(one[name], two[name])
        torch.testing.assert_close(merged[name], (one[name] + two[name]) / 2)
    assert all(path.read_bytes() == content for path, content in before.items())
    window(
        tags[0], run, "--curve", "mean", "--allow-pickle", "--out", tmp_path / "by-latest"
    )  # a run stands for its newest tag
    again = load_file(tmp_path / "by-latest/model.safetensors")
    assert all(torch.equal(merged[name], again[name]) for name in SHAPES)


@pytest.mark.parametrize("harm", ["truncate", "delete"])
def test_a_damaged_deepspeed_checkpoint_is_one_line(tmp_path: Path, harm: str) -> None:
    pytest.importorskip("deepspeed")
    run = shutil.copytree(ZERO / "stage2", tmp_path / "run")
    (file,) = (run / "global_step2").glob("*rank_1_mp*optim_states.pt")
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:100])
    else:
        file.unlink()
    with pytest.raises(UserError, match="cannot read the DeepSpeed checkpoint") as caught:
        window(run / "global_step1", run / "global_step2", "--allow-pickle", "--out", tmp_path / "merged")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "merged").exists() and not (run / "global_step2.converted").exists()


def test_dcp_directories_are_members(tmp_path: Path) -> None:
    for step in (1, 2):
        state = {"model": {"w": torch.full((3,), float(step))}, "optimizer": {"m": torch.zeros(3)}}
        save(state, checkpoint_id=str(tmp_path / f"step-{step}"), no_dist=True)
    members = [tmp_path / "step-1", tmp_path / "step-2"]
    with pytest.raises(UserError, match="--allow-pickle"):
        window(*members, "--out", tmp_path / "merged")
    window(*members, "--curve", "mean", "--allow-pickle", "--out", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")["w"], torch.full((3,), 1.5))


@pytest.mark.parametrize("harm", ["metadata", "data"])
def test_a_damaged_dcp_directory_is_one_line(tmp_path: Path, harm: str) -> None:
    for step in (1, 2):
        save({"w": torch.full((3,), float(step))}, checkpoint_id=str(tmp_path / f"step-{step}"), no_dist=True)
    damaged = tmp_path / "step-2" / (".metadata" if harm == "metadata" else "__0_0.distcp")
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot read the DCP checkpoint") as caught:
        window(tmp_path / "step-1", tmp_path / "step-2", "--allow-pickle", "--out", tmp_path / "merged")
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def test_kinds_of_checkpoints_mix(tmp_path: Path) -> None:
    """A DCP directory and a Hugging Face directory of one architecture, by the steps in their names."""
    from safetensors.torch import save_file

    save({"w": torch.zeros(3)}, checkpoint_id=str(tmp_path / "step-100"), no_dist=True)
    (tmp_path / "step-200").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "step-200/model.safetensors")
    members = list(itertools.chain(tmp_path.glob("step-100"), tmp_path.glob("step-200")))
    window(*members, "--curve", "linear", "--allow-pickle", "--out", tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")["w"], torch.full((3,), 0.5))
