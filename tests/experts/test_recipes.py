"""mergekit's recipes are read as they are: each form in its examples folder, with small local models in place of the hub's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from distmerge import cli
from distmerge.errors import UserError
from distmerge.experts import mergekit
from distmerge.experts.merge import open_all
from distmerge.experts.pairing import check_structure, pair
from distmerge.experts.recipe import Place, resolve
from tests.files.models import SHAPES, tensors, write

EXAMPLES = {
    "linear": """
models:
  - model: A
    parameters: {weight: 1.0}
  - model: B
    parameters: {weight: 0.3}
  - model: C
    parameters: {weight: 0.5}
merge_method: linear
dtype: float16
""",
    "bio-merge": """
models:
  - model: A
    parameters: {density: 0.5, weight: 0.5}
  - model: B
    parameters: {density: 0.5, weight: 0.5}
merge_method: ties
base_model: O
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
    "gradient-slerp": """
slices:
  - sources:
      - {model: A, layer_range: [0, 2]}
      - {model: B, layer_range: [0, 2]}
merge_method: slerp
base_model: A
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
dtype: float16
""",
    "two stacks": """
slices:
  - sources: [{model: A, layer_range: [0, 2]}]
  - sources: [{model: B, layer_range: [1, 2]}]
merge_method: passthrough
dtype: float16
""",
    "ties": """
models:
  - model: A
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: B
    parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}
  - model: C
    parameters:
      density: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
base_model: O
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes")
    base = tensors(0)
    write(path / "O", base)
    for index, name in enumerate("ABC"):
        write(path / name, tensors(index + 1, near=base))
    return path


def local(text: str, root) -> str:
    for name in "OABC":
        text = text.replace(f"model: {name}\n", f"model: {root / name}\n").replace(f"model: {name},", f"model: {root / name},")
    return text


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_plan(name, root):
    recipe = mergekit.parse(local(EXAMPLES[name], root))
    check_structure(recipe)
    pairings = pair(recipe, open_all(recipe, False))
    assert recipe.compat == "mergekit" and recipe.dtype == "float16"
    assert len(pairings) == len(SHAPES) + (2 if name == "two stacks" else 0)


def test_gradients_and_filters_reach_their_layers(root):
    recipe = mergekit.parse(local(EXAMPLES["ties"], root))
    by_name = {pairing.name: pairing for pairing in pair(recipe, open_all(recipe, False))}
    first, last = by_name["model.layers.0.mlp.up_proj.weight"], by_name["model.layers.1.mlp.up_proj.weight"]
    assert [one["density"] for one in first.each] == [1.0, 0.5, 0.33]
    assert [one["density"] for one in last.each] == [pytest.approx(0.1), 0.5, 0.33]
    assert [one["weight"] for one in first.each] == [1.0, 0.0, 0.5] and [one["weight"] for one in last.each] == [1.0, 1.0, 0.5]
    assert [one["weight"] for one in by_name["model.norm.weight"].each] == [1.0, 0.0, 0.0]


def test_gradient():
    assert [resolve([0, 1, 0.5], Place("x", depth)) for depth in (0, 0.25, 0.5, 1)] == [0.0, 0.5, 1.0, 0.5]
    assert resolve([True, False], Place("x", 0.9)) is True
    assert resolve([{"filter": "mlp", "value": 1}], Place("attn", 0)) is None


def test_stacked_layers_come_from_their_models(root, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(local(EXAMPLES["two stacks"], root).replace("float16", "bfloat16"))
    assert cli.run(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    out, a, b = (load_file(place / "model.safetensors") for place in (tmp_path / "out", root / "A", root / "B"))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(out[name.format(2)], b[name.format(1)]) and torch.equal(out[name.format(1)], a[name.format(1)])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(out["lm_head.weight"], b["lm_head.weight"])
    assert '"num_hidden_layers": 3' in (tmp_path / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (("merge_method: linear", "merge_method: linear\nslerp: 1"), "recipe.slerp is not supported"),
        (("merge_method: linear", "merge_method: nearswap"), "'nearswap': it is a method of mergekit that distmerge does not"),
        (("weight: 0.3", "weight: 0.3, density: 0.5"), "linear has no parameter density; it belongs to ties"),
        (("weight: 0.3", "wieght: 0.3"), "linear has no parameter wieght"),
        (("parameters: {weight: 0.3}", "parameters: {}"), "weight must be given for .*B at"),
        (("weight: 0.3", "weight: []"), r"weight must be a value, a list of values"),
        (("dtype: float16", "dtype: int64"), "dtype must be one of"),
        (("dtype: float16", "tokenizer: {tokens: {a: 1}}"), "tokenizer.tokens is not supported"),
        (("dtype: float16", "chat_template: chatml"), 'chat_template must be "auto" or a Jinja template'),
    ],
)
def test_refused_by_name(change, error, root, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(local(EXAMPLES["linear"].replace(*change), root))
    with pytest.raises(UserError, match=error):
        cli.run(["merge", str(path), "--out", str(tmp_path / "out")])


def test_models_that_do_not_match(root, tmp_path):
    tied = tensors(9)
    del tied["lm_head.weight"]
    write(tmp_path / "tied", tied)
    wide = tensors(9) | {"model.norm.weight": torch.ones(2).bfloat16()}
    write(tmp_path / "wide", wide)
    for other, error in (
        ("tied", r"tied has no tensor lm_head.weight, which .*A has; are its embeddings tied\?"),
        ("wide", r"model.norm.weight has shape \[2\] in .*wide, but \[1\] in .*A"),
    ):
        flags = ["--model", str(root / "A"), "--model", str(tmp_path / other), "--out", str(tmp_path / "out")]
        with pytest.raises(UserError, match=error):
            cli.run(["merge", "--method", "linear", *flags])


def test_toml(root, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'method = "ties"\nbase = "{root / "O"}"\n'
        'density = [{filter = "mlp", value = 0.2}, {value = 0.7}]\ntrim = "tensor"\n'
        + "".join(f'[[model]]\npath = "{root / name}"\nweight = 0.5\n' for name in "AB")
    )
    assert cli.run(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    assert '"trim": "tensor"' in (tmp_path / "out" / "merge.json").read_text()


def test_a_pickle_is_read_when_allowed(root, tmp_path):
    content = load_file(root / "A" / "model.safetensors")
    (tmp_path / "pickled").mkdir()
    torch.save(content, tmp_path / "pickled" / "pytorch_model.bin")
    flags = ["--model", str(tmp_path / "pickled"), "--model", str(root / "A"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="allow them by --allow-pickle"):
        cli.run(["merge", "--method", "linear", *flags])
    assert cli.run(["merge", "--method", "linear", "--allow-pickle", *flags]) == 0
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(out[name], content[name]) for name in content)
