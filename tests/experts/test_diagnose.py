"""The diagnosis says what a direct computation on whole task vectors says, and auto follows it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from distmerge.cli import main
from distmerge.errors import UserError
from tests.files.models import family, tensors, write


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return family(tmp_path_factory.mktemp("family"), members=3)


def flat(paths):
    base = load_file(paths[0] / "model.safetensors")
    return [
        torch.cat([(load_file(p / "model.safetensors")[n].double() - base[n].double()).flatten() for n in base])
        for p in paths[1:]
    ]


def test_figures(paths, capsys, tmp_path):
    flags = ["--base", str(paths[0]), *map(str, paths[1:]), "--json", "--plot", str(tmp_path / "plots")]
    assert main.run(["diagnose", *flags, "--tensorboard", str(tmp_path / "board")]) == 0
    report = json.loads(capsys.readouterr().out)
    deltas = flat(paths)
    for i in range(3):
        assert report["whole"]["norms"][i] == pytest.approx(float(deltas[i].norm()), rel=1e-5)
        for j in range(3):
            expected = float(torch.cosine_similarity(deltas[i], deltas[j], dim=0))
            assert report["whole"]["cosines"][i][j] == pytest.approx(expected, abs=2e-6)
    stack = torch.stack(deltas)
    mass = 1 - stack.sum(0).abs().sum() / stack.abs().sum()
    both = ((stack > 0).any(0) & (stack < 0).any(0)).double().sum() / (stack != 0).any(0).double().sum()
    assert report["whole"]["conflict_mass"] == pytest.approx(float(mass), rel=1e-5)
    assert report["whole"]["conflict_count"] == pytest.approx(float(both), rel=1e-9)
    assert set(report["layers"]) == {"model.layers.0", "model.layers.1"}
    assert "model.layers.*.mlp.up_proj.weight" in report["kinds"]
    assert all(0 <= entry["overlap"] <= 1 for entry in report["subspaces"]) and report["subspaces"]
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"cosines.png", "layers.png"}
    assert list((tmp_path / "board").iterdir())


def test_subspaces_of_equal_and_of_foreign_vectors(tmp_path, capsys):
    base = tensors(0, torch.float32)
    name = "model.layers.0.mlp.up_proj.weight"
    generator = torch.Generator().manual_seed(3)
    low = [torch.randn(1400, 8, generator=generator) @ torch.randn(8, 401, generator=generator) for _ in range(2)]
    paths = [write(tmp_path / "base", base)]
    for index, delta in enumerate((low[0], 2 * low[0], low[1])):
        paths.append(write(tmp_path / f"m{index}", base | {name: base[name] + 0.01 * delta}))
    main.run(["diagnose", "--base", str(paths[0]), *map(str, paths[1:]), "--json"])
    overlaps = {tuple(e["pair"]): e["overlap"] for e in json.loads(capsys.readouterr().out)["subspaces"] if e["tensor"] == name}
    assert overlaps[0, 1] > 0.99 and overlaps[0, 2] < 0.1


def test_the_report_of_a_merge_is_the_diagnosis(paths, tmp_path, capsys):
    main.run(["diagnose", "--base", str(paths[0]), *map(str, paths[1:]), "--json"])
    alone = json.loads(capsys.readouterr().out)
    named = [part for path in paths[1:] for part in ("--model", str(path))]
    flags = ["--base", str(paths[0]), *named, "--density", "0.5", "--report", "--out", str(tmp_path / "out")]
    main.run(["merge", "--method", "dare_ties", *flags])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for key in ("cosines", "norms", "conflict_count", "conflict_mass"):
        assert report["whole"][key] == alone["whole"][key]


@pytest.mark.parametrize("method", ["linear", "slerp", "nuslerp", "wise_ft", "model_stock", "sce"])
def test_every_method_has_a_report(method, paths, tmp_path):
    """Where the method has no base, the recipe's is taken all the same."""
    members = paths[1:2] if method in ("slerp", "wise_ft") else paths[1:3]
    factor = {"wise_ft": ":0.5"}.get(method, "")
    named = [part for path in members for part in ("--model", f"{path}{factor}")]
    more = ["--t", "0.3"] if method == "slerp" else []
    flags = ["--base", str(paths[0]), *named, *more, "--report", "--out", str(tmp_path / "out")]
    assert main.run(["merge", "--method", method, *flags]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    deltas = flat(paths)[: len(members)]
    assert report["whole"]["norms"] == pytest.approx([float(delta.norm()) for delta in deltas], rel=1e-5)
    assert report["origin"] == str(paths[0]) and report["models"] == [str(path) for path in members]
    assert 0 < report["whole"]["lost_to_rounding"] < 1
    assert (report["recommendation"] is None) == (len(members) == 1)


def test_what_each_task_vector_loses_to_the_outputs_dtype(tmp_path):
    base, *members = family(tmp_path / "wide", torch.float32)
    named = [part for path in members for part in ("--model", str(path))]
    flags = ["--base", str(base), *named, "--out-dtype", "bfloat16", "--report", "--out", str(tmp_path / "out")]
    assert main.run(["merge", "--method", "task_arithmetic", *flags]) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["whole"]["each_lost_to_rounding"]
    origin = load_file(base / "model.safetensors")
    for path, share in zip(members, found, strict=True):
        own = load_file(path / "model.safetensors")
        lost = sum(float((value.bfloat16().double() - value.double()).square().sum()) for value in own.values())
        size = sum(float((value.double() - origin[name].double()).square().sum()) for name, value in own.items())
        assert share == pytest.approx((lost / size) ** 0.5, rel=1e-4)


def test_without_any_base_a_report_starts_from_the_first_model(paths, tmp_path):
    named = [part for path in paths[1:] for part in ("--model", str(path))]
    assert main.run(["merge", "--method", "linear", *named, "--report", "--out", str(tmp_path / "out")]) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    one, *others = flat(paths)
    assert report["origin"] == str(paths[1]) and report["models"] == [str(path) for path in paths[2:]]
    assert report["whole"]["norms"] == pytest.approx([float((other - one).norm()) for other in others], rel=1e-5)
    assert report["recommendation"] is None


def test_auto_averages_what_is_alike_and_minds_conflicts(paths, tmp_path, capsys):
    base = load_file(paths[0] / "model.safetensors")
    one = load_file(paths[1] / "model.safetensors")
    near = {name: (one[name].float() + 0.1 * (one[name].float() - base[name].float())).bfloat16() for name in base}
    twin = write(tmp_path / "twin", near)
    for other, method in ((twin, "mean"), (paths[2], "dare_ties")):
        flags = ["--base", str(paths[0]), "--model", str(paths[1]), "--model", str(other), "--out", str(tmp_path / method)]
        assert main.run(["merge", "--method", "auto", *flags]) == 0
        assert f"method auto chose {method}:\n- the mean cosine" in capsys.readouterr().out
        assert json.loads((tmp_path / method / "merge.json").read_text())["recipe"]["method"] == method


def test_refused(paths, tmp_path):
    with pytest.raises(UserError, match="at least two models"):
        main.run(["diagnose", "--base", str(paths[0]), str(paths[1])])
    for twice in (paths[0], paths[1]):
        with pytest.raises(UserError, match=f"takes each model once, and not the base itself, got {twice} again"):
            main.run(["diagnose", "--base", str(paths[0]), str(paths[1]), str(twice)])
    with pytest.raises(UserError, match="--sequences must be >= 1, got 0"):
        main.run(["diagnose", "--base", str(paths[0]), str(paths[1]), str(paths[2]), "--sequences", "0"])
    flags = ["--model", str(paths[1]), "--model", str(paths[2]), "--out", str(tmp_path / "out"), "--report"]
    with pytest.raises(UserError, match="--report needs a method that merges several models, got passthrough"):
        main.run(["merge", "--method", "passthrough", *flags[:2], *flags[4:]])


def test_auto_takes_whole_models(paths, tmp_path):
    sources = "".join(f"[{{model: {path}, layer_range: [0, 1]}}]" for path in paths[1:2])
    (tmp_path / "r.yaml").write_text(f"merge_method: auto\nbase_model: {paths[0]}\nslices:\n" + f"- sources: {sources}\n" * 2)
    with pytest.raises(UserError, match="method auto needs whole models, got 2 slices"):
        main.run(["merge", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out")])
