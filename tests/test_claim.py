"""Whose a run directory is: claimed by a first step, not by a start that fails; a resume knows its own text and checkpoints."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import distmerge.launch.ranks
from distmerge.checkpoints.store import published_checkpoints
from distmerge.checkpoints.verify import verify_run
from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.files.fingerprints import BLOCK_BYTES, differences, fingerprints
from distmerge.files.manifest import read_manifest
from tests import jobs
from tests.checkpoints.runs import forget_after, lines, parameters, run, same, write_text
from tests.ranks import Outcome, Ranks, command


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path)


# ---- a start that fails


FAILURES = {
    "too large a batch": {"train": {"batch_size": 100_000, "threads": 1}},
    "positions": {"data": {"sequence_length": 100_000}},
    "an unknown key of the model": {"model": {"config": {"model_type": "llama", "hidden_sizes": 3}}},
    "a curve": {"window": {"every": 2}, "preview": {"every": 2, "curve": "round"}},
    "no vocabulary": {"model": {"config": {"model_type": "llama", "vocab_size": 3}}},
}


def test_a_start_that_fails_leaves_the_directory_to_the_one_that_is_put_right(tmp_path: Path, text: Path) -> None:
    for sections in FAILURES.values():
        with pytest.raises(UserError):
            run(tmp_path, "run", text, steps=4, **sections)
        assert not (tmp_path / "run" / "config.toml").exists()
        assert not (tmp_path / "run" / "environment.json").exists()
    directory = run(tmp_path, "run", text, steps=4)
    assert [line["step"] for line in lines(directory, "metrics.jsonl")] == [0, 1, 2, 3, 4, 4]
    with pytest.raises(UserError, match="belongs to a run of another configuration; differing keys: seed"):
        run(tmp_path, "run", text, steps=4, seed=1)


def test_a_first_step_that_fails_claims_nothing(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has said by then is no part of the run that follows."""
    from distmerge.engine.torch import TorchEngine

    def fail(*arguments: object) -> None:
        raise UserError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "train_step", fail)
        with pytest.raises(UserError, match="out of memory"):
            run(tmp_path, "run", text, steps=4)
    assert not (tmp_path / "run" / "config.toml").exists()
    again = run(tmp_path, "run", text, steps=4, seed=3)
    plain = run(tmp_path, "plain", text, steps=4, seed=3)
    assert same(parameters(again / "final"), parameters(plain / "final"))
    assert [line["step"] for line in lines(again, "metrics.jsonl")] == [0, 1, 2, 3, 4, 4]


# ---- starting from scratch


def test_restart_moves_the_old_run_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    config, run_dir, launched = jobs.write_config(tmp_path), tmp_path / "run", []

    def launch(ranks: int, arguments: list[str]) -> int:
        launched.append(arguments)
        return 0

    monkeypatch.setattr(distmerge.launch.ranks, "launch", launch)
    run_dir.mkdir()
    (run_dir / "config.toml").write_text(Path(config).read_text().replace("lr = 4e-3", "lr = 1e-3"))
    with pytest.raises(
        UserError, match=r"differing keys: optimizer\.lr; take another --run-dir, start from scratch with --restart"
    ):
        main.run(["train", config])
    assert main.run(["train", config, "--restart"]) == 0
    assert launched == [["train", config]], "the ranks, and whoever starts them again, do not start from scratch"
    assert (tmp_path / "run.old-1" / "config.toml").exists() and not (run_dir / "config.toml").exists()
    said = capsys.readouterr().err
    assert said == f"the run in {run_dir} was moved to {run_dir}.old-1; starting from scratch\n"
    with pytest.raises(UserError, match="matches no file"):
        main.run(["train", str(tmp_path / "run.old-1" / "config.toml"), "--restart", "--data.files", "nowhere/*.txt"])
    assert (tmp_path / "run.old-1").exists(), "what cannot start moves nothing"


def test_restart_is_refused_where_a_launcher_starts_the_ranks(ranks: Ranks, tmp_path: Path) -> None:
    (outcome,) = ranks.run(1, command, ["train", jobs.write_config(tmp_path), "--restart"], group=False)
    assert outcome.status == 2 and outcome.stderr.startswith("error: --restart cannot be used under a launcher")


# ---- whose a checkpoint is


def test_a_checkpoint_of_another_run_is_rejected_by_name(ranks: Ranks, tmp_path: Path) -> None:
    config = jobs.write_config(tmp_path)
    short = ["--steps", "6", "--train.gradient-accumulation", "1", "--evaluate.every", "100"]
    for name, seed in (("ours", "0"), ("theirs", "1")):
        arguments = ["train", config, *short, "--run-dir", str(tmp_path / name), "--seed", seed]
        assert [outcome.status for outcome in ranks.run(2, command, arguments, group=False)] == [0, 0]
    ours, theirs = tmp_path / "ours" / "checkpoints", tmp_path / "theirs" / "checkpoints"
    before = jobs.final_bytes(tmp_path / "ours")
    shutil.rmtree(ours / "step-00000006")
    (tmp_path / "ours" / "summary.json").unlink()
    shutil.copytree(theirs / "step-00000006", ours / "step-00000006")
    verdicts = {verdict.path: verdict.said for verdict in verify_run(tmp_path / "ours") if verdict.damaged}
    assert list(verdicts) == ["checkpoints/step-00000006"] and "of another run" in verdicts["checkpoints/step-00000006"]
    outcomes: list[Outcome] = ranks.run(
        2, command, ["train", config, *short, "--run-dir", str(tmp_path / "ours"), "--seed", "0"], group=False
    )
    said = "".join(outcome.stderr for outcome in outcomes)
    assert [outcome.status for outcome in outcomes] == [0, 0], said
    mine, other = (read_manifest(root / "step-00000005")["run"] for root in (ours, theirs))
    assert f"rejected checkpoint {ours / 'step-00000006'}: it is of another run ({other}, seed 1), this is run {mine}" in said
    assert jobs.final_bytes(tmp_path / "ours") == before
    assert (ours / "step-00000006.rejected").is_dir()


def test_a_manifest_says_whose_run_it_is_and_equal_runs_have_equal_parameters(tmp_path: Path, text: Path) -> None:
    first, second = (run(tmp_path, name, text, steps=4, window={"every": 2}) for name in ("first", "second"))
    said = []
    for directory in (first, second):
        manifests = [read_manifest(path) for path in published_checkpoints(directory / "checkpoints")]
        manifests += [read_manifest(directory / "window" / "block-00000002", "block.json"), read_manifest(directory / "final")]
        assert len({manifest["run"] for manifest in manifests}) == 1
        said.append(manifests[-1])
    assert said[0]["run"] != said[1]["run"]
    assert said[0]["sources"] == said[1]["sources"] and said[0]["seed"] == said[1]["seed"] == 0
    assert (first / "final" / "model.safetensors").read_bytes() == (second / "final" / "model.safetensors").read_bytes()


def test_changed_text_is_named_at_a_resume(tmp_path: Path, text: Path) -> None:
    directory = run(tmp_path, "run", text, steps=4)
    content = text.read_text()
    text.write_text(content + " more")
    with pytest.raises(
        UserError, match=r"config\.data is not what the run in .* began with: .*text\.txt has .* bytes and had"
    ) as told:
        run(tmp_path, "run", text, steps=6)
    assert "\n" not in str(told.value)
    text.write_text(content.replace("merge", "MERGE"))
    with pytest.raises(UserError, match=r"text\.txt has other content"):
        run(tmp_path, "run", text, steps=6)
    text.write_text(content)  # put back, at another time: that is no change
    run(tmp_path, "run", text, steps=6)
    assert json.loads((directory / "summary.json").read_text())["steps"] == 6


def test_an_older_run_without_an_identity_is_resumed(tmp_path: Path, text: Path) -> None:
    whole = run(tmp_path, "whole", text, steps=20)
    directory = run(tmp_path, "run", text, steps=20)
    forget_after(directory, 10)
    environment = json.loads((directory / "environment.json").read_text())
    del environment["identity"]
    (directory / "environment.json").write_text(json.dumps(environment))
    from distmerge.files.manifest import as_json, sealed

    manifest = directory / "checkpoints" / "step-00000010" / "manifest.json"
    kept = {key: value for key, value in read_manifest(manifest.parent).items() if key not in ("run", "seed", "sources")}
    manifest.write_bytes(as_json(sealed(kept)))
    run(tmp_path, "run", text, steps=20)
    assert same(parameters(directory / "final"), parameters(whole / "final"))
    assert json.loads((directory / "environment.json").read_text())["identity"]["run"]


# ---- fingerprints


def test_fingerprints_are_samples(tmp_path: Path) -> None:
    """A file of a terabyte, of which a few blocks are read; the first and the last bytes are among them."""
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    then = fingerprints({"large": path})
    for at in (0, (1 << 40) - 1):
        with open(path, "r+b") as file:
            file.seek(at)
            file.write(b"x")
        now = fingerprints({"large": path})
        assert differences(then, now) == ["large has other content"]
        then = now


def test_what_changed_is_said_of_every_file(tmp_path: Path) -> None:
    files = {name: tmp_path / name for name in ("a", "b", "c")}
    for path in files.values():
        path.write_bytes(b"\0" * 3 * BLOCK_BYTES)
    then = fingerprints(files)
    assert differences(then, fingerprints(files)) == []
    files["b"].write_bytes(b"\0" * BLOCK_BYTES + b"\1" + b"\0" * (2 * BLOCK_BYTES - 1))
    assert differences(then, fingerprints(files)) == ["b has other content"]
    (tmp_path / "d").write_bytes(b"")
    del files["a"]
    files["c"].write_bytes(b"shorter")
    now = fingerprints(files | {"d": tmp_path / "d"})
    assert differences(then, now) == ["a is gone", "d is new", f"c has 7 bytes and had {3 * BLOCK_BYTES:,}"]


def test_many_files_cost_no_more_than_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distmerge.files import fingerprints as room

    monkeypatch.setattr(room, "BUDGET_BLOCKS", 10)
    files = {str(index): tmp_path / str(index) for index in range(35)}
    for path in files.values():
        path.write_bytes(b"some text")
    found = fingerprints(files)
    assert sum(sample is not None for _, sample in found.values()) == 10
    assert all(size == 9 for size, _ in found.values())
