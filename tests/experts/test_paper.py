"""compat = "paper" against references written from the papers' formulas, in float64 and with no blocks."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.rules.random_masks import key_of, uniform
from tests.files.models import tensors, write
from tests.rules.coins import coins

WEIGHTS = (0.7, 0.4, 0.9)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A base and three models near it, float32."""
    root = tmp_path_factory.mktemp("paper")
    base = tensors(0, torch.float32)
    write(root / "base", base)
    for index in range(3):
        write(root / f"m{index}", tensors(index + 1, torch.float32, base))
    return root


def merge(root, out, method: str, *flags: str, weights=WEIGHTS) -> dict[str, torch.Tensor]:
    named = [part for i, weight in enumerate(weights) for part in ("--model", f"{root / f'm{i}'}:{weight}")]
    base = [] if method == "linear" else ["--base", str(root / "base")]
    assert main.run(["merge", "--method", method, *base, *named, "--out", str(out), *flags]) == 0
    return load_file(out / "model.safetensors")


def read(root) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    base = load_file(root / "base" / "model.safetensors")
    members = [load_file(root / f"m{i}" / "model.safetensors") for i in range(3)]
    return base, [{name: member[name].double() - base[name].double() for name in base} for member in members]


def close(ours, expected, base) -> None:
    for name, value in expected.items():
        assert torch.allclose(ours[name].double(), base[name].double() + value, rtol=1e-5, atol=2e-8), name


def test_task_arithmetic(models, tmp_path):
    base, deltas = read(models)
    ours = merge(models, tmp_path / "out", "task_arithmetic", "--lambda", "0.8")
    close(ours, {n: 0.8 * sum(w * d[n] for w, d in zip(WEIGHTS, deltas, strict=True)) for n in base}, base)


def test_ties(models, tmp_path):
    """Trim each task vector to its largest 20%, over the whole model; elect; the mean of those that agree."""
    base, deltas = read(models)
    ours = merge(models, tmp_path / "out", "ties", "--density", "0.2", "--lambda", "0.9", weights=(1, 1, 1))
    trimmed = []
    for delta in deltas:
        sizes = torch.cat([delta[name].float().abs().flatten() for name in base])
        bar = sizes.sort(descending=True).values[int(0.2 * len(sizes)) - 1]
        trimmed.append({name: torch.where(delta[name].float().abs() >= bar, delta[name], 0) for name in base})
    expected = {}
    for name in base:
        stack = torch.stack([delta[name] for delta in trimmed])
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        expected[name] = 0.9 * (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    close(ours, expected, base)


def draws(numbers, name: str, expert: int, shape) -> torch.Tensor:
    return numbers(key_of(0, name, expert), 0, int(torch.Size(shape).numel())).view(shape)


def test_dare(models, tmp_path):
    """Drop at random, divide by the probability to be kept."""
    base, deltas = read(models)
    ours = merge(models, tmp_path / "out", "dare_linear", "--density", "0.25")
    expected = {
        n: sum(
            w * d[n] * (draws(coins, n, i, d[n].shape) < 0.25) / 0.25
            for i, (w, d) in enumerate(zip(WEIGHTS, deltas, strict=True))
        )
        for n in base
    }
    close(ours, expected, base)


def test_dare_keeps_the_mean_and_the_density(models, tmp_path):
    base, deltas = read(models)
    ours = merge(models, tmp_path / "out", "dare_linear", "--density", "0.25", weights=(1,))
    name = "model.layers.0.mlp.up_proj.weight"
    moved = ours[name].double() - base[name].double()
    kept = (moved != 0).double().mean()
    assert abs(float(kept) - 0.25) < 5 * (0.25 * 0.75 / moved.numel()) ** 0.5
    assert abs(float(moved.sum() - deltas[0][name].sum())) < 5 * 0.003 * (3 * moved.numel()) ** 0.5


def test_della(models, tmp_path):
    """Ranks in each row; drop probabilities p - e/2 (largest) to p + e/2; divide by one's own odds; elect; mean."""
    base, deltas = read(models)
    ours = merge(models, tmp_path / "out", "della", "--density", "0.6", "--epsilon", "0.2", weights=(1, 1, 1))
    expected = {}
    for name in base:
        thin = []
        for expert, delta in enumerate(deltas):
            rows = delta[name].view(-1, delta[name].shape[-1])
            rank = rows.abs().argsort(dim=1, stable=True).argsort(dim=1).double()
            odds = 0.5 + 0.2 * (rank / max(1, rows.shape[1] - 1))
            odds = odds.view(delta[name].shape)
            thin.append(delta[name] * (draws(uniform, name, expert, delta[name].shape) < odds.float().double()) / odds)
        stack = torch.stack(thin)
        agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
        expected[name] = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    far = torch.cat([((ours[n].double() - base[n].double() - expected[n]).abs() > 1e-7).flatten() for n in base])
    assert int(far.sum()) <= 3  # a draw may fall between two roundings of its odds


def test_breadcrumbs(models, tmp_path):
    """Neither the smallest nor the largest 5% of a tensor; all that equal an end of what is kept."""
    base, deltas = read(models)
    ours = merge(models, tmp_path / "out", "breadcrumbs", "--density", "0.3", "--gamma", "0.05", weights=(0.5, 0.5, 0.5))
    expected = {}
    for name in base:
        total = torch.zeros_like(deltas[0][name])
        for delta in deltas:
            size = delta[name].float().abs().flatten()
            keep, top = int(0.3 * len(size)), int(0.05 * len(size))
            bottom = max(0, len(size) - keep - top)
            kept = size.sort().values[bottom : bottom + keep]
            chosen = (size >= kept[:1]) & (size <= kept[-1:]) if keep else torch.zeros_like(size)
            total += 0.5 * delta[name] * chosen.view(delta[name].shape)
        expected[name] = total
    close(ours, expected, base)


def test_model_stock(models, tmp_path):
    base, deltas = read(models)
    ours = merge(models, tmp_path / "out", "model_stock", weights=("1", "1", "1"))
    for name in base:
        flat = [delta[name].flatten() for delta in deltas]
        cosine = sum(torch.cosine_similarity(flat[i], flat[j], dim=0) for i, j in ((0, 1), (0, 2), (1, 2))) / 3
        t = 3 * cosine / (1 + 2 * cosine)
        expected = base[name].double() + t * sum(delta[name] for delta in deltas) / 3
        assert torch.allclose(ours[name].double(), expected, rtol=1e-4, atol=1e-7), name


def test_wise_ft_and_ptm(models, tmp_path):
    base, deltas = read(models)
    (tmp_path / "a").mkdir()
    flags = ["--base", str(models / "base"), "--model", f"{models / 'm0'}:0.3", "--out", str(tmp_path / "a" / "out")]
    assert main.run(["merge", "--method", "wise_ft", *flags]) == 0
    close(load_file(tmp_path / "a" / "out" / "model.safetensors"), {n: 0.3 * deltas[0][n] for n in base}, base)
    flags = ["--base", str(models / "base"), "--general", str(models / "m1"), "--out", str(tmp_path / "ptm")]
    assert (
        main.run(["merge", "--method", "ptm", "--model", f"{models / 'm0'}:0.3", "--model", f"{models / 'm2'}:0.5", *flags])
        == 0
    )
    close(
        load_file(tmp_path / "ptm" / "model.safetensors"),
        {n: deltas[1][n] + 0.3 * deltas[0][n] + 0.5 * deltas[2][n] for n in base},
        base,
    )


def test_omega_from_training_records(models, tmp_path, capsys):
    flags = ["--method", "ptm", "--base", str(models / "base"), "--general", str(models / "m1"), "--model", str(models / "m2")]
    with pytest.raises(UserError, match=r"omega must be given for .*m2: .*training.json does not say"):
        main.run(["merge", *flags, "--out", str(tmp_path / "out")])
    (models / "m1" / "training.json").write_text(json.dumps({"tokens": 1000}))
    (models / "m2" / "training.json").write_text(json.dumps({"tokens": 250}))
    assert main.run(["merge", *flags, "--out", str(tmp_path / "out")]) == 0
    assert "= 0.25" in capsys.readouterr().out
    base, deltas = read(models)
    close(load_file(tmp_path / "out" / "model.safetensors"), {n: deltas[1][n] + 0.25 * deltas[2][n] for n in base}, base)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--density", "1.5"], r"density of .* must be in \(0, 1\], got '1.5'"),
        (["--density", "0"], r"density of .* must be in"),
        (["--gamma", "0.1"], "ties has no parameter gamma; it belongs to breadcrumbs"),
        (["--on-tie", "first"], 'on_tie = "first" needs trim = "tensor"'),
        (["--rescale", "inverse"], "needs odds"),
    ],
)
def test_refused(flags, error, models, tmp_path):
    with pytest.raises(UserError, match=error):
        merge(models, tmp_path / "out", "ties", *flags)
