"""With compat = "mergekit", every method gives what mergekit 0.1.5 gives, with the same draws and a stable sort
(fixtures/make_mergekit.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from distmerge.cli import main

FIXTURES = Path(__file__).parent.parent / "fixtures" / "mergekit"
RECIPES = json.loads((FIXTURES / "recipes.json").read_text())
MODELS = ("base", "a", "b", "c", "z")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

EXACT = ("linear", "linear_sum", "passthrough")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """dtype -> the directory of the models, and mergekit's outputs by recipe."""
    found = {}
    for dtype in DTYPES:
        root = tmp_path_factory.mktemp(dtype)
        tensors = load_file(FIXTURES / f"{dtype}.safetensors")
        for model in MODELS:
            (root / model).mkdir()
            own = {key.split("/", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{model}/")}
            save_file(own, root / model / "model.safetensors")
            (root / model / "config.json").write_text((FIXTURES / "config.json").read_text())
        outputs = {name: {} for name in RECIPES}
        for key, value in tensors.items():
            if key.startswith("="):
                recipe, tensor = key[1:].split("/", 1)
                outputs[recipe][tensor] = value
        found[dtype] = root, outputs
    return found


def merge(recipe: dict, root: Path, out: Path, *flags: str) -> dict[str, torch.Tensor]:
    text = yaml.safe_dump(recipe)
    for model in MODELS:
        for key in ("model", "base_model"):
            text = text.replace(f"{key}: {model}\n", f"{key}: {root / model}\n")
    path = out.with_suffix(".yaml")
    path.write_text(text)
    assert main.run(["merge", str(path), "--out", str(out), "--threads", "1", *flags]) == 0
    return load_file(out / "model.safetensors")


def steps_apart(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """How many representable numbers lie between two tensors' elements."""
    bits = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}[ours.dtype]
    low = torch.iinfo(bits).min

    def ordered(x: torch.Tensor) -> torch.Tensor:
        raw = x.contiguous().view(bits).long()
        return torch.where(raw < 0, low - raw, raw)

    return (ordered(ours) - ordered(theirs)).abs()


def at_ties(recipe: dict, models: dict[str, dict[str, torch.Tensor]], key: str) -> torch.Tensor:
    """Where a member's magnitude (for sce, the variance) equals a threshold: an unstable sort chooses in mergekit."""
    base = models["base"][key]
    count = base.numel()
    entries = recipe["models"]
    delta = torch.stack([models[entry["model"]][key] - base for entry in entries]).flatten(1)
    marked = torch.zeros(count, dtype=torch.bool)
    if recipe["merge_method"] == "sce":
        variance = delta.var(0, unbiased=False).unsqueeze(0)
        k = int(int((variance != 0).sum()) * recipe["parameters"]["select_topk"])
        cuts = [(variance, (k,))]
    else:
        cuts = []
        for row, entry in zip(delta, entries, strict=True):
            density = entry["parameters"].get("density")
            if density is None:  # the gradient of ties_gradient: first and last layer
                layer = int(key.split(".")[2]) if ".layers." in key else 0
                density = recipe["parameters"]["density"][layer]
            keep, top = int(density * count), int(entry["parameters"].get("gamma", 0) * count)
            bottom = max(0, count - keep - top)
            cuts.append((row.unsqueeze(0), (count - bottom, count - bottom - keep + 1)))
    for values, ranks in cuts:
        size = values.abs().float().flatten()
        falling = size.sort(descending=True).values
        for rank in ranks:
            if 1 <= rank <= count:
                marked |= size == falling[rank - 1]
    return marked


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RECIPES)
def test_parity(name, dtype, golden, tmp_path):
    root, outputs = golden[dtype]
    ours = merge(RECIPES[name], root, tmp_path / "out")
    theirs = outputs[name]
    assert ours.keys() == theirs.keys()
    models = {model: load_file(root / model / "model.safetensors") for model in MODELS}
    tied = elements = 0
    for key, expected in theirs.items():
        apart = steps_apart(ours[key], expected).flatten()
        elements += apart.numel()
        if name.startswith(("ties", "breadcrumbs", "sce_topk")):
            ties = at_ties(RECIPES[name], models, key)
            far = apart > 1
            if name == "sce_topk" and int(ties.sum()) > 1:  # which of the tied are chosen also moves the coefficients
                reach = torch.stack([models[one][key] - models["base"][key] for one in "abc"]).abs().amax(0).flatten()
                far &= (ours[key].double() - expected.double()).flatten().abs() > 0.02 * reach
            assert int(far[~ties].sum()) == 0, key
            tied += int((apart[ties] > 1).sum())
        else:
            assert int(apart.max()) <= (0 if name in EXACT else 1), key
    assert tied <= 0.01 * elements, f"{tied} of {elements} elements differ at ties"
