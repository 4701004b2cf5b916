"""mergekit's recipes are read as they are: each form in its examples folder, with small local models in place of the hub's."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.merging import recipe_mergekit
from distmerge.merging.models import open_all
from distmerge.merging.pairing import check_structure, pair
from distmerge.merging.recipe import Place, resolve
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


TWO_STACKS = {
    "a linear merge of models that see": """
models:
  - model: A
    parameters:
      weight: 1.0
  - model: B
    parameters:
      weight: 1.0
merge_method: linear
dtype: float32
""",
    "ties with the base among the models": """
models:
  - model: A
    parameters:
      density: [1, 0.7, 0.1] # over the layers
      weight: 1.0
  - model: O
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
merge_method: ties
base_model: O
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
}

FIRST_LAYERS = """
slices:
  - sources:
    - model: A
      layer_range: [0, 3]
merge_method: passthrough
dtype: float16
"""


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
    recipe = recipe_mergekit.parse(local(EXAMPLES[name], root))
    check_structure(recipe)
    pairings = pair(recipe, open_all(recipe, False))
    assert recipe.compat == "mergekit" and recipe.dtype == "float16"
    assert len(pairings) == len(SHAPES) + (2 if name == "two stacks" else 0)


@pytest.fixture(scope="module")
def seeing(tmp_path_factory):
    """Models of two stacks of layers, six of one and three of the other."""
    path = tmp_path_factory.mktemp("seeing")
    names = [f"visual.blocks.{i}.mlp.fc1.weight" for i in range(6)] + [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    for seed, name in enumerate("OAB"):
        torch.manual_seed(seed)
        write(path / name, {key: torch.randn(4, 4).bfloat16() for key in [*names, "lm_head.weight"]})
    return path


@pytest.mark.parametrize("name", TWO_STACKS)
def test_each_stack_has_its_own_depth(name, seeing):
    recipe = recipe_mergekit.parse(local(TWO_STACKS[name], seeing))
    check_structure(recipe)
    found = {pairing.name: pairing for pairing in pair(recipe, open_all(recipe, False))}
    assert len(found) == 10
    if recipe.method == "ties":
        for stack, ends in (("visual.blocks.{}.mlp.fc1.weight", (0, 5)), ("model.layers.{}.mlp.up_proj.weight", (0, 2))):
            densities = [found[stack.format(end)].each[0]["density"] for end in ends]
            assert densities == [1.0, pytest.approx(0.1)]
        assert all(len(pairing.each) == 1 for pairing in found.values())  # the base has no task vector


def test_the_first_layers_of_a_model_with_other_names(tmp_path):
    content = {f"h.{i}.mlp.c_fc.weight": torch.full((2, 2), float(i)) for i in range(5)}
    front_and_end = {name: torch.ones(3, 2) for name in ("wte.weight", "wpe.weight", "ln_f.weight")}
    write(tmp_path / "A", content | front_and_end, config={"n_layer": 5, "vocab_size": 3})
    (tmp_path / "recipe.yaml").write_text(local(FIRST_LAYERS, tmp_path))
    assert main.run(["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]) == 0
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert set(out) == {*front_and_end, *(f"h.{i}.mlp.c_fc.weight" for i in range(3))}
    assert '"n_layer": 3' in (tmp_path / "out" / "config.json").read_text()


def test_several_recipes_in_one_file_are_refused(root):
    with pytest.raises(UserError, match="several recipes in one file are not supported; write one file each"):
        recipe_mergekit.parse(local(EXAMPLES["linear"] + "---" + EXAMPLES["ties"], root))


def test_gradients_and_filters_reach_their_layers(root):
    recipe = recipe_mergekit.parse(local(EXAMPLES["ties"], root))
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
    assert main.run(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
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
        (("weight: 0.3", "weight: 0.3, density: 0.5"), "mean has no parameter density; it belongs to ties"),
        (("weight: 0.3", "wieght: 0.3"), "mean has no parameter wieght"),
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
        main.run(["merge", str(path), "--out", str(tmp_path / "out")])


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
            main.run(["merge", "--method", "linear", *flags])


def test_toml(root, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        f'method = "ties"\nbase = "{root / "O"}"\n'
        'density = [{filter = "mlp", value = 0.2}, {value = 0.7}]\ntrim = "tensor"\n'
        + "".join(f'[[model]]\npath = "{root / name}"\nweight = 0.5\n' for name in "AB")
    )
    assert main.run(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    assert '"trim": "tensor"' in (tmp_path / "out" / "merge.json").read_text()


def test_a_pickle_is_read_when_allowed(root, tmp_path):
    content = load_file(root / "A" / "model.safetensors")
    (tmp_path / "pickled").mkdir()
    torch.save(content, tmp_path / "pickled" / "pytorch_model.bin")
    flags = ["--model", str(tmp_path / "pickled"), "--model", str(root / "A"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match="allow them with --allow-pickle"):
        main.run(["merge", "--method", "linear", *flags])
    assert main.run(["merge", "--method", "linear", "--allow-pickle", *flags]) == 0
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(out[name], content[name]) for name in content)
