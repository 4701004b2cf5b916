"""Rules from outside: made in a module of the user's, or in an installed package that distmerge knows nothing of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import distmerge as dm
from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.rules import catalogue
from distmerge.rules.plugins import load_plugins
from distmerge.rules.protocol import run
from tests.files.models import family

MODULE = '''
import torch
import distmerge as dm

@dm.rule("{name}", parameters={{"beta": 2.0}})
class Drawn(dm.Rule):
    """The median, beta times as far from the base."""

    def __init__(self, target: dm.Target):
        self.beta = target.shared["beta"]

    def merge(self, block: dm.Block, state):
        median = torch.stack([member.float() for member in block.members]).median(0).values
        base = 0 if block.base is None else block.base.float()
        return base + self.beta * (median - base)
'''


def recipe(folder: Path, method: str, models: list[Path], *lines: str) -> Path:
    path = folder / "recipe.toml"
    named = [f'[[model]]\npath = "{model}"' for model in models[1:]]
    path.write_text(
        "\n".join([f'method = "{method}"', f'base = "{models[0]}"', 'out_dtype = "float32"', *lines, *named]) + "\n"
    )
    return path


def drawn(models: list[Path], beta: float) -> dict[str, torch.Tensor]:
    base, *others = [load_file(model / "model.safetensors") for model in models]
    found = {}
    for name, value in base.items():
        median = torch.stack([other[name].float() for other in others]).median(0).values
        found[name] = value.float() + beta * (median - value.float())
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_module_that_the_recipe_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = family(tmp_path / "models", members=3)
    (tmp_path / "my_rules.py").write_text(MODULE.format(name="my-drawn"))
    monkeypatch.chdir(tmp_path)
    path = recipe(tmp_path, "my-drawn", models, 'plugins = ["my_rules"]', "beta = 0.5")
    assert main.run(["merge", str(path), "--out", str(tmp_path / "out")]) == 0
    assert same(load_file(tmp_path / "out" / "model.safetensors"), drawn(models, 0.5))
    load_plugins(["my_rules"])  # once more changes nothing
    assert str(tmp_path) not in sys.path


def install(site: Path, name: str) -> None:
    """A package as pip installs it: a module, and a folder that says which rule it offers."""
    metadata = site / f"{name}-1.0.dist-info"
    metadata.mkdir(parents=True)
    (site / f"{name}.py").write_text(MODULE.format(name=f"{name}-drawn"))
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[distmerge.rules]\n{name}-drawn = {name}\n")


def test_an_installed_package_is_found_by_the_name_of_its_rule(tmp_path: Path) -> None:
    """With its own parameter in the recipe, which is known once the package is imported."""
    site, models = tmp_path / "site", family(tmp_path / "models", members=3)
    install(site, "foreign")
    path = recipe(tmp_path, "foreign-drawn", models, "beta = 0.5")
    command = [sys.executable, "-m", "distmerge", "merge", str(path), "--out", str(tmp_path / "out")]
    environment = os.environ | {"PYTHONPATH": f"{site}{os.pathsep}{Path(dm.__file__).parents[1]}"}
    subprocess.run(command, check=True, env=environment, cwd=tmp_path)
    assert same(load_file(tmp_path / "out" / "model.safetensors"), drawn(models, 0.5))


@pytest.mark.parametrize("verb", ["merge", "window", "merge by Python", "window by Python"])
def test_every_verb_finds_the_rule_of_an_installed_package(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, name = family(tmp_path / "models", members=3), f"installed_{verb.replace(' ', '_')}"
    install(tmp_path / "site", name)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    base, *members = map(str, models)
    out, rule = tmp_path / "out", f"{name}-drawn"
    flags = ["--base", base, "--out", str(out)]
    match verb:
        case "merge":
            named = [word for model in members for word in ("--model", model)]
            assert main.run(["merge", "--method", rule, *named, "--out-dtype", "float32", *flags]) == 0
        case "window":
            assert main.run(["window", *members, "--rule", rule, "--dtype", "F32", *flags]) == 0
        case "merge by Python":
            options = dm.MergeOptions(out_dtype="float32")
            dm.merge(method=rule, models=members, base=base, out=out, options=options, beta=2.0)
        case _:
            dm.window(members, rule=rule, base=base, out=out, options=dm.WindowOptions(dtype="F32"), beta=2.0)
    assert same(load_file(out / "model.safetensors"), drawn(models, 2.0))


def test_flags_name_a_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = family(tmp_path / "models", members=3)
    (tmp_path / "flagged_rules.py").write_text(MODULE.format(name="flagged-drawn"))
    monkeypatch.chdir(tmp_path)
    base, *members = map(str, models)
    command = ["window", *members, "--rule", "flagged-drawn", "--base", base, "--dtype", "F32", "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"--rule must be one of .*, got 'flagged-drawn'"):
        main.run(command)
    assert main.run([*command, "--plugins", "flagged_rules"]) == 0
    assert same(load_file(tmp_path / "out" / "model.safetensors"), drawn(models, 2.0))
    with pytest.raises(UserError, match="--plugins: there is no module missing_rules on Python's path"):
        main.run([*command, "--plugins", "missing_rules"])


def test_a_plain_function() -> None:
    @dm.rule("halved")
    def halved(delta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (delta * weight.unsqueeze(1)).sum(0) / 2

    target = dm.Target("x", (3,), ({"weight": 1.0}, {"weight": 3.0}))
    one, two = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 1.0])
    assert run(catalogue.build("halved", target), [one, two]).tolist() == [0.5, 2.5, 3.0]
    assert halved(torch.ones(1, 1), torch.ones(1)).item() == 0.5, "it stays the function that it was"


def test_a_function_must_give_one_element_for_each() -> None:
    dm.rule("crooked")(lambda delta, weight: delta)
    with pytest.raises(UserError, match=r"rule crooked must give a tensor of shape \[3\], got \[1, 3\]"):
        run(catalogue.build("crooked", dm.Target("x", (3,), ({},))), [torch.ones(3)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "plugins: there is no module wanted on Python's path"),
        ("import nothing_of_that_name", "plugins: wanted imports nothing_of_that_name, which is not installed"),
        ("1 / 0", "plugins: wanted cannot be imported: ZeroDivisionError"),
        ("import distmerge as dm\ndm.rule('ties')(lambda delta, weight: delta[0])", "there is a rule ties already"),
        ("import distmerge as dm\ndm.rule('linear')(lambda delta, weight: delta[0])", "there is a rule linear already"),
        ("import distmerge as dm\ndm.rule('mine')(3)", "rule mine must be a subclass of Rule or a function"),
    ],
)
def test_mistakes_are_told_in_a_line(
    content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "wanted.py").write_text(content)
    with pytest.raises(UserError, match=message):
        load_plugins(["wanted"])


@pytest.mark.parametrize(
    ("name", "place", "message"),
    [
        ("tize", {}, "rule must be one of mean, tokens, .*, got 'tize'"),
        ("karcher", {}, "got 'karcher': it is a method of mergekit that distmerge does not have"),
        ("tokens", {}, "rule = 'tokens' needs the tokens and steps of a round"),
        ("ties", {"base": False}, "rule = 'ties' needs a base"),
        ("radial", {"whole": False}, "rule = 'radial' needs whole tensors"),
        ("model-stock", {"members": 1}, "rule = 'model_stock' takes at least 2 members, got 1"),
        ("slerp", {"members": 3}, "rule = 'slerp' takes 2 members, got 3"),
        ("slerp", {"given": ("density",)}, "rule = 'slerp' needs t, which cannot be given here"),
    ],
)
def test_a_place_refuses_a_rule_by_what_is_missing(name: str, place: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        catalogue.check(name, "rule", **place)


def test_names_of_a_rule() -> None:
    assert catalogue.canonical("linear") == "mean" and catalogue.entry("dare-linear") is catalogue.entry("dare")
    assert catalogue.entry("trimmed-mean") is catalogue.entry("trimmed_mean")
    assert all(catalogue.describe(name).endswith(catalogue.entry(name).source) for name in catalogue.names())
