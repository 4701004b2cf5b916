"""A sweep's losses are those of the merged models, and the best one is what it writes; what a diagnosis measures on text."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.evaluate import evaluate_directory
from distmerge.files.sources import OnDisk


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep")
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=384,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", "one", "two"):
        model.save_pretrained(path / name)
        ByT5Tokenizer().save_pretrained(path / name)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    for skill, word in (("plain", "the quick brown fox "), ("digits", "3141592653 ")):
        (path / f"{skill}.txt").write_text(word * 400)
    return path


def flags(root, *more: str) -> list[str]:
    skills = [part for name in ("plain", "digits") for part in ("--skill", f"{name}={root / name}.txt")]
    models = [part for name in ("one", "two") for part in ("--model", str(root / name))]
    return ["sweep", *skills, *models, "--sequence-length", "32", "--sequences", "16", "--json", *more]


def test_grid(root, tmp_path, capsys):
    more = ["--method", "task_arithmetic", "--base", str(root / "base"), "--grid", "lambda=0,0.5,1", "--plot", str(tmp_path)]
    assert main.run(flags(root, *more, "--pick", "--out", str(tmp_path / "out"))) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["name"] for point in found["points"]] == ["lambda = 0", "lambda = 0.5", "lambda = 1"]
    best = min(found["points"], key=lambda point: point["mean"])
    assert found["best"] == best["name"] and (tmp_path / "pareto.png").exists()
    for skill in ("plain", "digits"):
        loss = evaluate_directory(str(tmp_path / "out"), [str(root / f"{skill}.txt")], 32, 16).loss
        assert loss == pytest.approx(best["losses"][skill], rel=1e-5)


def test_densities_and_soup(root, tmp_path, capsys):
    more = ["--method", "ties", "--base", str(root / "base"), "--grid", "density=0.2,1"]
    assert main.run(flags(root, *more)) == 0
    one, two = json.loads(capsys.readouterr().out)["points"]
    assert one["losses"] != two["losses"]
    assert main.run(flags(root, "--method", "greedy_soup", "--pick", "--out", str(tmp_path / "soup"))) == 0
    points = json.loads(capsys.readouterr().out.splitlines()[0])["points"]
    assert points[0]["kept"] and (tmp_path / "soup" / "model.safetensors").exists()


def test_task_vectors_are_computed_once(root, capsys, monkeypatch):
    """Three densities with a global trim, two passes each: every tensor is read from disk once."""
    read: dict[str, int] = {}
    once = OnDisk.read

    def counted(self, start, stop):
        place = f"{self.stored[0].file} {self.stored[0].start}"
        read[place] = read.get(place, 0) + stop - start
        return once(self, start, stop)

    monkeypatch.setattr(OnDisk, "read", counted)
    more = ["--method", "ties", "--base", str(root / "base"), "--grid", "density=0.2,0.5,1"]
    assert main.run(flags(root, *more)) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert len({point["losses"]["plain"] for point in points}) == 3
    total = sum(
        value.numel() for name in ("base", "one", "two") for value in load_file(root / name / "model.safetensors").values()
    )
    assert sum(read.values()) == total


def test_a_diagnosis_on_files(root, capsys):
    files = [str(root / "plain.txt")]
    (root / "copy").symlink_to(root / "one")
    more = ["--sequence-length", "32", "--sequences", "16", "--json"]
    models = [str(root / name) for name in ("one", "two", "copy")]
    assert main.run(["diagnose", "--base", str(root / "base"), *models, "--files", *files, *more]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = [evaluate_directory(model, files, 32, 16).loss for model in models]
    assert found["losses"] == pytest.approx(expected, rel=1e-6)
    barriers, divergences = ({tuple(e["pair"]): e["value"] for e in found[key]} for key in ("barriers", "divergences"))
    assert set(barriers) == {(0, 1), (0, 2), (1, 2)} and min(barriers.values()) >= 0
    assert barriers[0, 2] == pytest.approx(0, abs=1e-6) and divergences[0, 2] == pytest.approx(0, abs=1e-6)
    assert divergences[0, 1] == pytest.approx(divergences[1, 2]) and divergences[0, 1] > 1e-6
    assert main.run(["diagnose", "--base", str(root / "base"), *models[:2], "--files", *files, *more[:-1]]) == 0
    said = capsys.readouterr().out
    assert "loss barrier 0-1: " in said and "KL divergence 0-1: " in said
    with pytest.raises(UserError, match="absent"):
        main.run(["diagnose", "--base", str(root / "base"), *models[:2], "--files", str(root / "absent*.txt")])


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--pick"], "--pick and --out DIR must be given together"),
        (["--out", "somewhere"], "--pick and --out DIR must be given together"),
        (["--pick", "--out", "{root}"], "--out must not exist yet"),
        (["--sequence-length", "1"], "--sequence-length must be >= 2, got 1"),
        (["--sequence-length", "4000"], "sequence_length must be <= "),
    ],
)
def test_refused_before_anything_is_measured(more, error, root):
    given = ["--method", "task_arithmetic", "--base", str(root / "base"), "--grid", "lambda=0.5"]
    with pytest.raises(UserError, match=error):
        main.run([*flags(root, *given), *(value.format(root=root) for value in more)])


def test_what_is_no_number_is_never_the_best(root, capsys):
    given = ["--method", "task_arithmetic", "--base", str(root / "base"), "--grid", "lambda=1e38,0.5", "--json"]
    assert main.run(flags(root, *given)) == 0
    assert json.loads(capsys.readouterr().out)["best"] == "lambda = 0.5"


@pytest.mark.parametrize("grid", [None, "lambda", "lambda=a", "lambda=nan", "nothing=1", "normalize=1"])
def test_refused(grid, root):
    more = ["--grid", grid] if grid else []
    with pytest.raises(UserError, match="--grid must be PARAMETER=X,Y"):
        main.run(flags(root, "--method", "task_arithmetic", "--base", str(root / "base"), *more))
