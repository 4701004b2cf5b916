"""Adapters merge as the full models that they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.files.adapters import read_adapter
from distmerge.files.sources import Maps
from distmerge.merging.lora import combine, inner_products
from tests.files.models import tensors, write

NAMES = ("model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj")


def adapter(path: Path, seed: int, rank: int = 4, **config) -> Path:
    generator = torch.Generator().manual_seed(seed)
    path.mkdir()
    content = {}
    for name in NAMES:
        content[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, 401, generator=generator) * 0.1
        content[f"base_model.model.{name}.lora_B.weight"] = torch.randn(1400, rank, generator=generator) * 0.1
    save_file(content, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["up_proj"]} | config
    (path / "adapter_config.json").write_text(json.dumps(said))
    return path


def change(path: Path, name: str) -> torch.Tensor:
    """The adapter's dW, float64."""
    content = load_file(path / "adapter_model.safetensors")
    config = json.loads((path / "adapter_config.json").read_text())
    a, b = (content[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    return config["lora_alpha"] / config["r"] * b @ a


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("lora")
    write(path / "base", tensors(0, torch.float32))
    adapter(path / "one", 1)
    adapter(path / "two", 2, rank=3)
    return path


def merge(root: Path, out: Path, method: str, *flags: str) -> None:
    named = ["--model", f"{root / 'one'}:0.6", "--model", f"{root / 'two'}:0.3", "--out", str(out)]
    assert main.run(["merge", "--method", method, *named, *flags]) == 0


def test_adapters_are_models(root, tmp_path):
    base = load_file(root / "base" / "model.safetensors")
    merge(root, tmp_path / "out", "task_arithmetic", "--base", str(root / "base"))
    out = load_file(tmp_path / "out" / "model.safetensors")
    for name in NAMES:
        expected = base[f"{name}.weight"].double() + 0.6 * change(root / "one", name) + 0.3 * change(root / "two", name)
        assert torch.allclose(out[f"{name}.weight"].double(), expected, atol=1e-6)
    assert torch.equal(out["lm_head.weight"], base["lm_head.weight"])
    pair = [f"{root / 'base'}+{root / name}" for name in ("one", "two")]
    assert (
        main.run(["merge", "--method", "linear", "--model", pair[0], "--model", pair[1], "--out", str(tmp_path / "mean")]) == 0
    )
    mean = load_file(tmp_path / "mean" / "model.safetensors")
    expected = base[f"{NAMES[0]}.weight"].double() + (change(root / "one", NAMES[0]) + change(root / "two", NAMES[0])) / 2
    assert torch.allclose(mean[f"{NAMES[0]}.weight"].double(), expected, atol=1e-6)


def test_cat_is_exact_and_svd_is_the_best_of_its_rank(root, tmp_path):
    merge(root, tmp_path / "cat", "cat")
    merge(root, tmp_path / "svd", "svd", "--rank", "2")
    merge(root, tmp_path / "full", "svd", "--rank", "7")
    for name in NAMES:
        exact = 0.6 * change(root / "one", name) + 0.3 * change(root / "two", name)
        assert torch.allclose(change(tmp_path / "cat", name), exact, atol=1e-7)
        assert torch.allclose(change(tmp_path / "full", name), exact, atol=1e-6)
        values = torch.linalg.svdvals(exact)
        error = (change(tmp_path / "svd", name) - exact).norm()
        assert float(error) == pytest.approx(float(values[2:].norm()), rel=1e-5)
    assert json.loads((tmp_path / "cat" / "adapter_config.json").read_text())["r"] == 7
    assert main.run(["merge", "--verify", str(tmp_path / "cat")]) == 0


def test_inner_products_need_no_full_matrix(root):
    maps = Maps()
    pairs = [combine([read_adapter(root / name)], [1.0], maps) for name in ("one", "two")]
    full = [torch.cat([change(root / name, key).flatten() for key in NAMES]) for name in ("one", "two")]
    expected = torch.stack(full) @ torch.stack(full).T
    assert torch.allclose(inner_products(pairs), expected, rtol=1e-5)


def test_a_diagnosis_of_adapters(root, capsys):
    models = [str(root / "one"), str(root / "two")]
    assert main.run(["diagnose", "--base", str(root / "base"), *models, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    full = [torch.cat([change(root / name, key).flatten() for key in NAMES]) for name in ("one", "two")]
    cosine = float(torch.cosine_similarity(full[0], full[1], dim=0))
    assert report["adapters"]["norms"] == pytest.approx([float(one.norm()) for one in full], rel=1e-6)
    assert report["adapters"]["cosines"][0][1] == pytest.approx(cosine, abs=1e-6)
    assert report["whole"]["cosines"][0][1] == pytest.approx(cosine, abs=1e-3)
    with pytest.raises(UserError, match="--files needs whole models"):
        main.run(["diagnose", "--base", str(root / "base"), *models, "--files", str(root / "base" / "config.json")])


def test_extract_finds_a_low_rank_change(root, tmp_path):
    base = load_file(root / "base" / "model.safetensors")
    moved = base | {f"{name}.weight": base[f"{name}.weight"] + change(root / "one", name).float() for name in NAMES}
    write(tmp_path / "full", moved)
    flags = ["--base", str(root / "base"), "--model", str(tmp_path / "full"), "--rank", "4", "--out", str(tmp_path / "out")]
    assert main.run(["merge", "--method", "extract", *flags]) == 0
    for name in NAMES:
        assert torch.allclose(change(tmp_path / "out", name), change(root / "one", name), atol=1e-6)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["cat", "--lambda", "2"], "cat makes an adapter of models and weights, got lambda, too"),
        (["cat", "--rank", "2"], "got rank, too"),
        (["svd", "--rank", "2", "--report"], "svd makes an adapter of models, weights and --rank, got report, too"),
        (["svd", "--rank", "2", "--dtype", "bfloat16"], "got dtype, too"),
        (["extract", "--rank", "2"], "extract makes an adapter of a base, a model and --rank, got weight, too"),
        (["task_arithmetic", "--rank", "2"], "--rank is only for the methods svd and extract, got method task_arithmetic"),
    ],
)
def test_what_has_no_use_is_refused(flags, error, root, tmp_path):
    with pytest.raises(UserError, match=error):
        merge(root, tmp_path / "out", *flags)


@pytest.mark.parametrize(
    ("config", "error"),
    [
        ({"use_dora": True}, "lora_magnitude_vector is missing, but adapter_config.json says use_dora = True"),
        ({"use_bdlora": {"on": True}}, "use_bdlora is not supported"),
        ({"peft_type": "IA3"}, "peft_type must be LORA"),
        ({"r": 0}, "must have r >= 1"),
    ],
)
def test_refused(config, error, root, tmp_path):
    adapter(tmp_path / "bad", 3, **config)
    with pytest.raises(UserError, match=error):
        main.run(["merge", "--method", "cat", "--model", str(tmp_path / "bad"), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="is not a LoRA adapter"):
        main.run(["merge", "--method", "cat", "--model", str(root / "base"), "--out", str(tmp_path / "out")])
