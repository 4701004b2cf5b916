"""The Python API: its examples run as they stand, its results are typed, and it writes what the commands write."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import distmerge as dm
import distmerge.api
from distmerge.cli import main
from tests.files.models import family


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models base, m0 and m1, in which the test runs."""
    base, *members = family(tmp_path / "family", torch.float32)
    for path, name in zip((base, *members), ("base", "a", "b"), strict=True):
        path.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def examples(text: str) -> str:
    """The indented lines of a docstring."""
    return "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))


def test_the_example_of_the_docstring_runs(models: Path) -> None:
    code = examples(distmerge.api.__doc__ or "")
    assert "dm.merge(" in code
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["result"].method == "ties" and (models / "merged/merge.json").exists()


def test_a_merge_writes_what_the_command_writes(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--base", "base", "--model", "a:0.3", "--model", "b:0.6", "--lambda", "0.5", "--out", "by-command"]
    assert main.run(["merge", "--method", "task_arithmetic", *given]) == 0
    said = capsys.readouterr().out
    result = dm.merge(
        method="task_arithmetic", models=[("a", 0.3), ("b", 0.6)], base="base", lambda_=0.5, out=models / "by-api"
    )
    assert capsys.readouterr().out == ""
    assert (models / "by-api/model.safetensors").read_bytes() == (models / "by-command/model.safetensors").read_bytes()
    assert re.sub(r"[\d.]+ s", "", str(result)) == re.sub(r"[\d.]+ s", "", said.strip()).replace(
        "by-command", str(models / "by-api")
    )
    assert (result.kind, result.tensors, result.out) == ("model", 7, models / "by-api")
    assert json.loads(json.dumps(result.as_dict()))["outputs"].keys() == {"model.safetensors"}


def test_a_recipe_in_a_file_takes_variants_and_options_alone(models: Path) -> None:
    Path("r.toml").write_text(
        'method = "ties"\nbase = "base"\ndensity = 0.5\n[[model]]\npath = "a"\nweight = 1\n[[model]]\npath = "b"\nweight = 1\n'
    )
    result = dm.merge("r.toml", out="merged", trim="tensor", options=dm.MergeOptions(seed=3, out_dtype="bfloat16", report=True))
    record = json.loads((models / "merged/merge.json").read_text())["recipe"]
    assert (record["variants"]["trim"], record["seed"], record["out_dtype"]) == ("tensor", 3, "bfloat16")
    assert result.report is not None and result.report.models == ["a", "b"]
    wrong: list[dict[str, Any]] = [{"density": 0.1}, {"base": "base"}, {"method": "ties"}]
    for given in wrong:
        with pytest.raises(dm.UserError, match="belongs to a recipe in flags"):
            dm.merge("r.toml", out="other", **given)


def test_a_diagnosis_has_the_figures_of_the_command(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diagnosis = dm.diagnose(["a", "b"], base="base", plot="plots")
    main.run(["diagnose", "a", "b", "--base", "base", "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(diagnosis.as_dict()))
    main.run(["diagnose", "a", "b", "--base", "base"])
    assert capsys.readouterr().out.strip() == str(diagnosis)
    assert diagnosis.recommendation is not None and diagnosis.recommendation.method == "dare_ties"
    assert (models / "plots/cosines.png").exists()


def checkpoints(folder: Path) -> list[Path]:
    """Three checkpoints of one model, with a buffer."""
    generator = torch.Generator().manual_seed(0)
    paths = []
    for step in (100, 200, 300):
        path = folder / f"checkpoint-{step}"
        path.mkdir()
        weights = {"w": torch.randn(40, 50, generator=generator), "bn.num_batches_tracked": torch.tensor(step)}
        save_file(weights, path / "model.safetensors")
        paths.append(path)
    return paths


def test_a_window_by_a_curve(tmp_path: Path) -> None:
    members = checkpoints(tmp_path)
    result = dm.window(members, curve=lambda x: 1 - x, out=tmp_path / "merged", explain=True)
    named = dm.window(members, curve="linear", out=tmp_path / "named")
    assert result.weights == named.weights and result.members == ("checkpoint-100", "checkpoint-200", "checkpoint-300")
    assert str(named) == f"{tmp_path}/named: 3 merged by linear, N_eff 3.0"
    assert "merging should" in "\n".join(result.advice)
    assert (tmp_path / "merged/model.safetensors").read_bytes() == (tmp_path / "named/model.safetensors").read_bytes()


def test_a_window_by_a_rule_is_the_rule_on_the_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = checkpoints(tmp_path)
    first, second, third = (load_file(path / "model.safetensors")["w"] for path in members)
    assert main.run(["window", *map(str, members), "--rule", "median", "--out", str(tmp_path / "median")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/median: 3 merged by median\n"
    merged = load_file(tmp_path / "median/model.safetensors")
    assert torch.equal(merged["w"], torch.stack([first, second, third]).median(0).values)
    assert merged["bn.num_batches_tracked"] == 300
    result = dm.window(members, rule="task-arithmetic", out=tmp_path / "oldest", lambda_=0.5)
    assert str(result) == f"{tmp_path}/oldest: 2 merged by task_arithmetic from checkpoint-100"
    expected = first + 0.5 * ((second - first) + (third - first))
    torch.testing.assert_close(load_file(tmp_path / "oldest/model.safetensors")["w"], expected)
    other = dm.window(members[1:], rule="task_arithmetic", base=members[0], out=tmp_path / "given", lambda_=0.5)
    assert other.base == "checkpoint-100"
    assert (tmp_path / "given/model.safetensors").read_bytes() == (tmp_path / "oldest/model.safetensors").read_bytes()


def test_a_window_by_a_rule_follows_the_same_bytes_as_a_merge(tmp_path: Path) -> None:
    base, *members = family(tmp_path / "family", torch.float32, members=3)
    dm.window(members, rule="ties", base=base, density=0.3, out=tmp_path / "window")
    dm.merge(method="ties", models=members, base=base, density=0.3, out=tmp_path / "merge")
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("window", "merge"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rule": "ties", "curve": "linear"}, "--curve sets the weights of rule mean only, got it with --rule ties"),
        ({"rule": "ties", "quadrature": "mean"}, "--quadrature sets the weights of rule mean only"),
        ({"rule": "ties", "plot": "w.svg"}, "--plot draws the weights of rule mean"),
        ({"rule": "ptm"}, "--rule ptm needs a general model besides the base"),
        ({"rule": "tokens"}, "needs the tokens and steps of a round"),
        ({"rule": "median", "base": "x"}, "--rule median has no use for a base, got --base x"),
        ({"rule": "nothing"}, "--rule must be one of mean, "),
        ({"rule": "slerp"}, "slerp takes 1 models besides the base, got 2"),
        ({"density": 0.5}, "--density is for other rules: the weights of rule mean come from --curve"),
        ({"rule": "ties", "densty": 0.5}, "densty is not a parameter of any method"),
        ({"rule": "median", "density": 0.5}, "median has no parameter density"),
        ({"options": None, "last": 1}, "last is not a parameter of any method"),
    ],
)
def test_a_window_refuses_in_one_line(given: dict[str, Any], words: str, tmp_path: Path) -> None:
    members = checkpoints(tmp_path)
    with pytest.raises(dm.UserError) as caught:
        dm.window(members, out=tmp_path / "out", **given)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dm.MergeOptions(threads=0), "--threads must be >= 1, got 0"),
        (lambda: dm.WindowOptions(last=0), "--last must be >= 1, got 0"),
        (lambda: dm.TextOptions(sequence_length=1), "--sequence-length must be >= 2, got 1"),
        (lambda: dm.merge(out="x"), "needs a RECIPE, or --method and --model"),
    ],
)
def test_options_are_checked_when_they_are_made(make: Any, words: str) -> None:
    with pytest.raises(dm.UserError, match=words):
        make()


def test_the_package_shows_its_names_and_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert dm.__version__ == version("distmerge")
    assert set(dir(dm)) >= {"merge", "diagnose", "sweep", "window", "DiLoCo", "MergeOptions", "__version__"}
    for name in dir(dm):
        if name != "WorkerRanks":
            assert getattr(dm, name) is not None
    with pytest.raises(SystemExit) as left:
        main.run(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"distmerge {dm.__version__}\n"
    assert (Path(dm.__file__).parent / "py.typed").exists()


def test_the_verbs_and_their_options_load_without_torch() -> None:
    code = "import sys, distmerge as dm; dm.merge, dm.window, dm.SweepOptions, dm.WindowOptions; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
