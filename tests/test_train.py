"""Training in warm ranks: the trainer as any launcher runs it, without the seconds that imports take."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distmerge.checkpoints.store import published_checkpoints
from distmerge.cli import main
from distmerge.config import toml
from distmerge.files.directories import verify
from distmerge.files.manifest import read_manifest
from tests import jobs
from tests.ranks import Outcome, Ranks, command

FAST = ("--steps", "12", "--train.gradient-accumulation", "1", "--evaluate.every", "100", "--log.every", "3")


def train(ranks: Ranks, world: int, *arguments: str) -> str:
    """Train in ``world`` ranks; what they said."""
    outcomes: list[Outcome] = ranks.run(world, command, ["train", *arguments], group=False)
    said = "".join(outcome.stderr for outcome in outcomes)
    assert [outcome.status for outcome in outcomes] == [0] * world, said
    return outcomes[0].stdout + said


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> str:
    return jobs.write_config(tmp_path_factory.mktemp("train"))


MERGE = '[[merge]]\nkind = "diloco"\nevery = 7\nouter_momentum = 0.5\n'

VARIANTS: dict[str, tuple[int, str, tuple[str, ...]]] = {
    "diloco": (2, MERGE, ()),
    "diloco of three workers": (3, MERGE, ("--mesh.workers", "3")),
    "average": (2, '[[merge]]\nkind = "average"\nevery = 5', ()),
    "none": (2, '[[merge]]\nkind = "none"', ()),
    "two mergers": (2, MERGE + '[[merge]]\nkind = "average"\nevery = 4', ()),
    "streaming": (
        2,
        '[[merge]]\nkind = "streaming-diloco"\nevery = 4\nfragments = 2',
        ("--model.config.num-hidden-layers", "2"),
    ),
    "sparta and diloco": (2, '[[merge]]\nkind = "sparta"\nfraction = 0.1\nevery = 4\ndelay = 1\nema = 0.5\n' + MERGE, ()),
    "sharded outer step": (4, MERGE + "outer_sharded = true", ()),
    "radial": (2, MERGE + 'rule = "radial"', ()),
    "data parallelism": (2, "", ("--mesh.workers", "1")),
    "the largest seed": (2, '[[merge]]\nkind = "sparta"\nfraction = 0.1\n', ("--seed", str(2**63 - 1))),
    "one rank": (1, "", ("--mesh.workers", "1")),
    "two workers of two ranks": (4, MERGE, ("--train.gradient-accumulation", "2")),
    "muon": (2, MERGE, ("--optimizer.name", "muon", "--optimizer.weight-decay", "0.01")),
    "bfloat16": (2, MERGE, ("--train.precision", "bfloat16")),
    "no clipping": (2, MERGE, ("--train.gradient-clip", "0")),
    "dropout": (2, MERGE, ("--model.config.attention-dropout", "0.3")),
    "stream": (2, MERGE, ("--data.streaming", "true", "--data.files", "{folder}/rows.jsonl")),
}
"""World, [[merge]] and overrides of runs that must resume bitwise; at step 8 the overlapped ones have values in flight."""


def variant(name: str, folder: Path) -> tuple[int, list[str]]:
    world, merge, overrides = VARIANTS[name]
    path = jobs.write_config(folder, jobs.CONFIG.replace(MERGE, merge))
    rows = [json.dumps({"text": f"{index} workers and {index * index} anchors move. " * 3}) for index in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return world, [path, *FAST, *(word.format(folder=folder) for word in overrides)]


# ---- resuming


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_in_two_parts_is_the_run_in_one(ranks: Ranks, tmp_path: Path, name: str) -> None:
    """Stopped in mid-round and in mid-line of the record, in each kind of run: the same bytes as without a stop."""
    world, arguments = variant(name, tmp_path)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(ranks, world, *arguments, "--run-dir", str(whole))
    train(ranks, world, *arguments, "--run-dir", str(parts), "--steps", "8")
    first = jobs.final_bytes(parts)
    said = train(ranks, world, *arguments, "--run-dir", str(parts))
    assert f"resuming from {parts}/checkpoints/step-00000008" in said
    assert jobs.final_bytes(parts) == jobs.final_bytes(whole) != first
    assert jobs.untimed(parts) == jobs.untimed(whole)
    assert all(verify(path) is None for path in published_checkpoints(parts / "checkpoints"))


def test_a_finished_run_extended(ranks: Ranks, config: str, tmp_path: Path) -> None:
    """The steps between checkpoints, too: the run ends at step 9, where no checkpoint was due."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(ranks, 2, config, *FAST, "--run-dir", str(whole), "--steps", "13")
    for steps in ("9", "11", "13"):
        train(ranks, 2, config, *FAST, "--run-dir", str(parts), "--steps", steps)
    assert jobs.final_bytes(parts) == jobs.final_bytes(whole)


def test_a_finished_run_started_again(ranks: Ranks, config: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """By its ranks, as torchrun does, and by the command that launches: nothing changes, and the table is there again."""
    run = tmp_path / "run"
    arguments = [config, *FAST, "--run-dir", str(run), "--steps", "9"]
    train(ranks, 2, *arguments)
    before = jobs.final_bytes(run), jobs.untimed(run)
    assert "eval loss" in train(ranks, 2, *arguments)
    assert (jobs.final_bytes(run), jobs.untimed(run)) == before
    assert len(published_checkpoints(run / "checkpoints")) == 2
    assert main.run(["train", *arguments]) == 0
    assert main.run(["train", *arguments, "--steps", "5"]) == 0
    assert capsys.readouterr().out.count("has finished its 9 steps\n\neval loss ") == 2


def test_other_keys_that_may_change(ranks: Ranks, config: str, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "moved"
    train(ranks, 2, config, *FAST, "--run-dir", str(whole))
    train(ranks, 2, config, *FAST, "--run-dir", str(tmp_path / "parts"), "--steps", "8")
    (tmp_path / "parts").rename(parts)
    changed = ("--log.every", "2", "--evaluate.every", "3", "--evaluate.sequences", "2", "--checkpoint.every", "4")
    train(ranks, 2, config, *FAST, "--run-dir", str(parts), *changed, "--checkpoint.keep", "1", "--train.threads", "1")
    assert jobs.final_bytes(parts) == jobs.final_bytes(whole)
    assert [path.name for path in published_checkpoints(parts / "checkpoints")] == ["step-00000012"]


def test_a_run_of_other_ranks_is_refused(ranks: Ranks, config: str, tmp_path: Path) -> None:
    arguments = ["train", config, *FAST, "--run-dir", str(tmp_path / "run")]
    ranks.run(2, command, [*arguments, "--steps", "6"], group=False)
    outcomes = ranks.run(4, command, arguments, group=False)
    assert [outcome.status for outcome in outcomes] == [2] * 4
    said = [line for outcome in outcomes for line in outcome.stderr.splitlines()]
    newest = tmp_path / "run" / "checkpoints" / "step-00000006"
    assert said == [
        "error: config.train.batch_size x gradient_accumulation x 4 ranks must be 4, the sequences of a step in "
        f"{newest}, got 8"
    ]


# ---- what comes out


def test_final_is_the_merged_model(ranks: Ranks, config: str, tmp_path: Path) -> None:
    """The tail of 12 steps % 7 is no whole round: what is published is the mean of the workers' last states."""
    run = tmp_path / "run"
    train(ranks, 2, config, *FAST, "--run-dir", str(run))
    model = AutoModelForCausalLM.from_pretrained(run / "final")
    published = run / "checkpoints" / "step-00000012"
    first, second = (load_file(published / f"parameters-{worker:05}.safetensors") for worker in (0, 1))
    assert torch.load(published / "rank-00000.pt", weights_only=True)["mergers"][0]["round"] == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), (first[name] + second[name]) / 2, rtol=0, atol=1e-6)


def test_data_parallelism_inside_a_worker_is_one_rank_with_all_of_the_batch(ranks: Ranks, config: str, tmp_path: Path) -> None:
    """Two ranks with batches of 2, and one rank with the four sequences as two micro steps, see the same data."""
    losses = {}
    for world, accumulation in ((2, "1"), (1, "2")):
        run = tmp_path / str(world)
        text = Path(config).read_text().replace(MERGE, "")
        path = tmp_path / "config.toml"
        path.write_text(text)
        sizes = ("--mesh.workers", "1", "--train.gradient-accumulation", accumulation, "--log.every", "1")
        train(ranks, world, str(path), *FAST, *sizes, "--run-dir", str(run))
        losses[world] = [(line["train/loss"], line["grad_norm"]) for line in jobs.lines_of(run) if "train/loss" in line]
        final = load_file(run / "final" / "model.safetensors")
        losses[f"{world} final"] = torch.cat([tensor.view(-1) for tensor in final.values()])
    torch.testing.assert_close(losses["2 final"], losses["1 final"], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(losses[2]), torch.tensor(losses[1]), rtol=1e-4, atol=0)


def test_a_checkpoint_says_what_it_is_of(ranks: Ranks, config: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(ranks, 4, config, *FAST, "--run-dir", str(run), "--steps", "5")
    manifest = read_manifest(run / "checkpoints" / "step-00000005")
    assert (manifest["step"], manifest["world"], manifest["workers"]) == (5, 4, 2)
    of_workers = [
        f"{kind}-{worker:05}.{suffix}"
        for kind, suffix in (("optimizer", "pt"), ("parameters", "safetensors"))
        for worker in (0, 1)
    ]
    assert sorted(manifest["files"]) == sorted([*of_workers, *(f"rank-{rank:05}.pt" for rank in range(4))])
    stored = toml.read(str(run / "config.toml"), [])
    assert stored == toml.read(config, [*FAST, "--run_dir", str(run), "--steps", "5"])


# ---- what the repository ships


SMALL = (
    "--steps",
    "4",
    "--schedule.warmup",
    "1",
    "--evaluate.sequences",
    "2",
    "--train.batch-size",
    "2",
    "--checkpoint.every",
    "2",
)


@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_trains(ranks: Ranks, path: Path, tmp_path: Path) -> None:
    shipped = toml.read(str(path), [])
    overrides: list[Any] = [*SMALL, "--run-dir", str(tmp_path / "run")]
    overrides += ["--schedule.decay", "1"] if shipped.schedule.name == "wsd" else []
    for index, merge in enumerate(shipped.merge):
        least = getattr(merge, "fragments", 1) * (getattr(merge, "overlap", 0) + 1)
        overrides += [f"--merge.{index}.every", str(2 * least)] if merge.kind != "none" else []
    train(ranks, shipped.mesh.workers, str(path), *overrides)
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


# ---- a disk that is full


def test_a_full_disk_harms_nothing_that_was_published(ranks: Ranks, config: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=400k none {disk} 2>/dev/null"):
        pytest.skip("cannot mount a small disk here; tests/checkpoints limits the size of files instead")
    try:
        run = disk / "run"
        arguments = ["train", config, *FAST, "--run-dir", str(run), "--checkpoint.every", "1", "--checkpoint.keep", "100"]
        outcomes: list[Outcome] = ranks.run(2, command, arguments, group=False)
        said = [line for outcome in outcomes for line in outcome.stderr.splitlines() if line.startswith("error")]
        assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
        assert len(said) == 1
        assert "No space left on device" in said[0]
        published = published_checkpoints(run / "checkpoints")
        assert published
        assert [verify(path) for path in published] == [None] * len(published)
        os.system(f"mount -o remount,size=20m {disk}")
        train(ranks, 2, *arguments[1:])
        train(ranks, 2, *arguments[1:], "--run-dir", str(tmp_path / "whole"))
        assert jobs.final_bytes(run) == jobs.final_bytes(tmp_path / "whole")
    finally:
        os.system(f"umount {disk}")
        shutil.rmtree(disk, ignore_errors=True)
