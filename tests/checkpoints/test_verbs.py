"""The verbs on runs and models that are there: window, anneal, recover, verify."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distmerge.cli import main, training
from distmerge.config.train import Optimizer
from distmerge.engine.optimizers import build_optimizers
from distmerge.errors import UserError
from distmerge.files.manifest import as_json, read_manifest, sealed
from distmerge.windows.blocks import published_blocks, stable_blocks
from distmerge.windows.curvature import newest_curvature
from distmerge.windows.curves import weights
from tests.checkpoints.runs import lines, parameters, run, same, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    return run(tmp_path_factory.mktemp("trained"), "run", text, window={"every": 8, "blocks": 0})


def window(*arguments: object) -> int:
    return main.run(["window", *map(str, arguments)])


def test_linear_over_equal_blocks_is_the_plain_mean(trained: Path, tmp_path: Path) -> None:
    assert window(trained, "--out", tmp_path / "merged") == 0
    blocks = [parameters(trained / f"window/block-{end:08}") for end in (8, 16, 24, 32, 40)]
    for name, tensor in parameters(tmp_path / "merged").items():
        torch.testing.assert_close(tensor, torch.stack([block[name] for block in blocks]).mean(0))
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    record = json.loads((tmp_path / "merged/merge.json").read_text())
    assert sum(record["weights"].values()) == pytest.approx(1)
    assert record["implied_schedule"][0] == [0.0, 1.0] and record["curve"] == "linear"
    assert len(record["inputs"]) == 5 and all(len(entry["sha256"]) == 64 for entry in record["inputs"].values())


def test_every_chunk_size_and_thread_count_gives_the_same_bytes(trained: Path, tmp_path: Path) -> None:
    contents = []
    for threads, chunk in ((1, 1 << 20), (2, 70000), (3, 1)):
        out = tmp_path / f"{threads}-{chunk}"
        window(trained, "--curve", "1-sqrt", "--out", out, "--threads", threads, "--chunk", chunk)
        contents.append((out / "model.safetensors").read_bytes())
    assert contents[0] == contents[1] == contents[2]


def test_last_and_steps_and_curves(trained: Path, tmp_path: Path) -> None:
    window(trained, "--last", 3, "--curve", "cosine", "--out", tmp_path / "last")
    window(trained, "--steps", "24:40", "--curve", "cosine", "--out", tmp_path / "steps")
    assert same(parameters(tmp_path / "last"), parameters(tmp_path / "steps"))
    c = weights("cosine", [0, 1 / 3, 2 / 3])
    blocks = [parameters(trained / f"window/block-{end:08}") for end in (24, 32, 40)]
    for name, tensor in parameters(tmp_path / "last").items():
        torch.testing.assert_close(tensor, sum(float(w) * block[name] for w, block in zip(c, blocks, strict=True)))


def test_foreign_models_take_their_steps_from_their_names(tmp_path: Path) -> None:
    for step, value in ((100, 1.0), (200, 2.0), (400, 4.0)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        save_file({"w": torch.full((3,), value)}, tmp_path / f"checkpoint-{step}/model.safetensors")
    members = [tmp_path / f"checkpoint-{step}" for step in (100, 200, 400)]
    window(*members, "--curve", "linear", "--out", tmp_path / "merged")
    c = weights("linear", [0, 100 / 450, 300 / 450])  # the window ends one mean spacing after the last
    torch.testing.assert_close(parameters(tmp_path / "merged")["w"], torch.full((3,), float(c @ [1.0, 2.0, 4.0])))
    with pytest.raises(UserError, match="increase"):
        window(*reversed(members), "--out", tmp_path / "reversed")
    assert not (tmp_path / "reversed").exists()


def test_buffers_by_policy(tmp_path: Path) -> None:
    def models(name: str, buffer: torch.Tensor, other: torch.Tensor) -> list[Path]:
        for index, value in enumerate((buffer, other)):
            (tmp_path / f"m-{index}").mkdir(exist_ok=True)
            save_file({"w": torch.ones(2), name: value}, tmp_path / f"m-{index}/model.safetensors")
        return [tmp_path / "m-0", tmp_path / "m-1"]

    members = models("bn.num_batches_tracked", torch.tensor(3), torch.tensor(5))
    window(*members, "--out", tmp_path / "last")
    assert parameters(tmp_path / "last")["bn.num_batches_tracked"] == 5
    members = models("position_ids", torch.arange(3), torch.arange(3) + 1)
    with pytest.raises(UserError, match="position_ids differs"):
        window(*members, "--out", tmp_path / "equal")
    members = models("counts", torch.arange(3), torch.arange(3))
    with pytest.raises(UserError, match="buffer counts"):
        window(*members, "--out", tmp_path / "unknown")
    assert sorted(path.name for path in tmp_path.glob("*") if path.name[0] not in "m.") == ["last"]


def test_the_curvature_is_the_newest_checkpoints_second_moments(trained: Path, tmp_path: Path) -> None:
    curvature = newest_curvature(trained)
    assert curvature is not None and curvature.source == "step-00000040"
    model = AutoModelForCausalLM.from_pretrained(trained / "final")
    engine = build_optimizers(model, Optimizer())[0]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in engine.param_groups for parameter in group["params"]]
    states = torch.load(trained / "checkpoints/step-00000040/optimizer-00000.pt", weights_only=True)
    assert list(curvature.diagonal) == order
    for index, name in enumerate(order):
        assert torch.equal(curvature.diagonal[name], states[0]["state"][index]["exp_avg_sq"].view(-1))
    assert newest_curvature(trained / "window") is None


def test_explain_and_plot(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    window(trained, "--explain", "--plot", tmp_path / "merge.svg")
    said = capsys.readouterr().out
    assert "drift/noise ratio of 5 members" in said and said.count("merging should") == 2
    assert "weighted by the curvature (Adam's second moments in step-00000040)" in said
    assert (tmp_path / "merge.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--out DIR"),
        (["--out", "OUT", "--curve", "lineer"], "lineer"),
        (["--out", "OUT", "--last", "1"], "at least two"),
        (["--out", "OUT", "--last", "0"], "--last must be >= 1"),
        (["--out", "OUT", "--last", "99"], "--last must be <= "),
        (["--out", "OUT", "--steps", "4"], "A:B"),
        (["--out", "OUT", "--curve", "table:0=1,0.5=1.2,1=0"], "must not increase"),
        (["--out", "OUT", "--curve", "table:0=1,1=-0.1"], "stay in [0, 1]"),
        (["--out", "OUT", "--steps", "1:9"], "at least two"),
    ],
)
def test_refused_in_one_line(trained: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        window(trained, *[str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments])
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_tainted_blocks_are_left_out_and_one_alone_is_refused(trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    for step in (8, 16, 24):
        shutil.rmtree(copied / f"window/block-{step:08}")
    taint(copied / "window/block-00000040")
    with pytest.raises(UserError, match="at least two members, got 1"):
        window(copied, "--out", tmp_path / "out")
    shutil.copytree(trained / "window/block-00000024", copied / "window/block-00000024")
    window(copied, "--curve", "mean", "--out", tmp_path / "out")
    assert [Path(name).name for name in json.loads((tmp_path / "out/merge.json").read_text())["weights"]] == [
        "block-00000024",
        "block-00000032",
    ]


def test_stable_blocks_verify_are_untainted_and_of_one_stretch(trained: Path, tmp_path: Path) -> None:
    window = tmp_path / "window"
    shutil.copytree(trained / "window", window)
    names = [f"block-{step:08}" for step in (40, 32, 24, 16, 8)]
    assert stable_blocks(window, 3, 40) == names[:3] and stable_blocks(window, 9, 33) == names[1:]
    taint(window / names[1])
    (window / names[2] / "model.safetensors").write_bytes(b"")
    assert stable_blocks(window, 9, 40) == [names[0], *names[3:]]
    taint(window / names[3], tainted=False, lr=1.0)  # of another learning rate
    assert stable_blocks(window, 9, 40) == [names[0], names[4]]


def taint(path: Path, **changes: Any) -> None:
    """The block's record, written again, says that a spike touched it, or what else it is told to."""
    record = read_manifest(path, "block.json") | {"tainted": True} | changes
    (path / "block.json").write_bytes(as_json(sealed(record)))


def test_blocks_that_do_not_fit_are_refused(trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    block = copied / "window/block-00000040"
    tensors = load_file(block / "model.safetensors")
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, block / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="XXH128"):
        window(copied, "--out", tmp_path / "out")
    tensors[name] = torch.zeros(3)
    save_file(tensors, block / "model.safetensors")
    with pytest.raises(UserError, match=name.replace(".", r"\.")):
        window(copied, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recover_by_hand(trained: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    shutil.rmtree(copied / "final")
    sick = load_file(trained / "checkpoints/step-00000030/parameters-00000.safetensors")
    damaged = copied / "checkpoints/step-00000020/optimizer-00000.pt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert main.run(["recover", str(copied), "--before", "40", "--merge-last", "2"]) == 0
    assert "step-00000020" in capsys.readouterr().out
    assert (copied / "checkpoints/step-00000040.tainted").is_dir()
    assert [path.name[-2:] for path in published_blocks(copied / "window")] == ["08", "16", "24"]
    run(tmp_path, "run", text, window={"every": 8, "blocks": 0})
    event = next(event for event in lines(copied, "events.jsonl") if event["event"] == "merged and rolled back")
    assert event["to"] == 30 and event["merged"] == ["step-00000030", "step-00000010"]
    assert sick and all(torch.isfinite(tensor).all() for tensor in parameters(copied / "final").values())


def test_recover_without_anything_stable(trained: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    for path in (copied / "checkpoints").glob("step-*/manifest.json"):
        path.unlink()
    with pytest.raises(UserError, match="no stable checkpoint") as caught:
        main.run(["recover", str(copied)])
    assert "\n" not in str(caught.value)
    assert len(list((copied / "checkpoints").iterdir())) == 4


def annealed(directory: Path, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> dict[str, Any]:
    """``distmerge anneal`` in this process; the newest line of the ledger."""

    def train(config: Any, ranks: int, command: list[str]) -> int:
        entry = lines(directory, "ledger.jsonl")[-1]
        assert math.isfinite(entry["predicted"]) and "outcome" not in entry
        assert config.steps == 40 and config.schedule.curve == "1-sqrt" and config.window is None
        from tests.checkpoints import runs

        table = config.model_dump(mode="json", by_alias=True, exclude_none=True)
        runs.run(Path(config.run_dir).parent, Path(config.run_dir).name, Path(config.data.files[0]), **table)
        return 0

    monkeypatch.setattr(training, "start", train)
    flags = ["anneal", str(directory), "--from", "20", "--decay-steps", "20", "--curve", "1-sqrt"]
    assert main.run([*flags, *map(str, arguments)]) == 0
    return lines(directory, "ledger.jsonl")[-1]


def moved(trained: Path, to: Path, **changes: tuple[str, str]) -> Path:
    """A copy of a run, with words of its configuration changed."""
    shutil.copytree(trained, to)
    stored = (to / "config.toml").read_text().replace(str(trained), str(to))
    for before, after in changes.values():
        assert before in stored
        stored = stored.replace(before, after)
    (to / "config.toml").write_text(stored)
    return to


def test_anneal_predicts_first_and_compares_after(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = moved(trained, tmp_path / "run")
    entry = annealed(copied, monkeypatch)
    assert entry["error"] == pytest.approx(entry["predicted"] / entry["outcome"] - 1)
    assert entry["predicted"] == entry["merged"] and "uncorrected" in entry["basis"]
    again = annealed(copied, monkeypatch)  # its own outcome is known, and must not help
    assert again["predicted"] == entry["predicted"] and len(lines(copied, "ledger.jsonl")) == 1
    flags = ["anneal", str(copied), "--from", "20", "--decay-steps", "20"]
    for wrong, words in ((["--from", "21"], "one of 10, 20"), (["--decay-steps", "0"], ">= 1")):
        with pytest.raises(UserError, match=words):
            main.run([*flags, *wrong])


def test_forks_of_another_seed_correct_the_prediction(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = moved(trained, tmp_path / "run")
    other = moved(trained, tmp_path / "other", seed=("seed = 0", "seed = 1"))
    fork = {"from": 20, "decay_steps": 20, "curve": "1-sqrt", "merged": 3.0, "outcome": 2.0}
    (other / "ledger.jsonl").write_text(json.dumps(fork) + "\n")
    entry = annealed(copied, monkeypatch, "--calibrate", other)
    assert entry["predicted"] == pytest.approx(entry["merged"] * 2 / 3, rel=1e-3) and "corrected by 1" in entry["basis"]
    slower = moved(trained, tmp_path / "slower", seed=("seed = 0", "seed = 1"), lr=("lr = 0.004", "lr = 0.002"))
    for sibling, words in ((copied, "differs in nothing"), (slower, "optimizer.lr"), (tmp_path / "none", "run's directory")):
        with pytest.raises(UserError, match=words):
            annealed(copied, monkeypatch, "--calibrate", sibling)
    (other / "ledger.jsonl").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        annealed(copied, monkeypatch, "--calibrate", other)


def test_verify(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copied = tmp_path / "run"
    shutil.copytree(trained, copied)
    assert main.run(["verify", str(copied)]) == 0
    (copied / "window/block-00000016/model.safetensors").unlink()
    assert main.run(["verify", str(copied)]) == 1
    assert "window/block-00000016: model.safetensors is missing" in capsys.readouterr().out
