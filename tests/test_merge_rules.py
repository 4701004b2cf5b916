"""The rule of a [[merge]] entry and its parameters: the catalogue's, checked before anything is loaded."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from distmerge.config import toml as config_file
from distmerge.errors import UserError
from tests.test_config import BASE, merges

TIES = ["--merge.0.rule", "ties", "--merge.0.density", "0.3", "--merge.0.rescale", "true"]
ALL = {"density": 1.0, "rescale": True, "lambda": 2.0}
BY_ROW = {"filter_wise": True}


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "base.toml").write_text(BASE)
    return str(tmp_path / "base.toml")


@pytest.mark.parametrize(
    ("entry", "rule", "weights", "parameters"),
    [
        ('rule = "ties"\ndensity = 0.3', "ties", "equal", {"density": 0.3}),
        ('rule = "ties"\ndensity = 1\nrescale = true\nlambda = 2', "ties", "equal", ALL),
        ('rule = "trimmed-mean"\ntrim = 0.2', "trimmed_mean", "equal", {"trim": 0.2}),
        ('rule = "tokens"', "mean", "tokens", {}),
        ('rule = "radial"\nweights = "tokens"', "radial", "tokens", {}),
        ('rule = "slerp"\nt = 0.5', "slerp", "equal", {"t": 0.5}),
        ('rule = "auto"\nauto_rule = "model-stock"\nauto_above = 0.8\nfilter_wise = true', "auto", "equal", BY_ROW),
    ],
)  # fmt: skip
def test_a_rule_and_its_parameters_survive_the_dump(
    tmp_path: Path, entry: str, rule: str, weights: str, parameters: dict
) -> None:
    config = merges(tmp_path, entry=entry)
    section = config.merge[0]
    assert (section.rule, section.weights, section.parameters) == (rule, weights, parameters)
    table = tomllib.loads(config_file.dump(config))
    assert {key: table["merge"][0][key] for key in parameters} == parameters
    assert config_file.validate(table) == config
    assert config_file.differing_keys(config, config_file.validate(table)) == []


def test_parameters_are_given_on_the_command_line(path: str) -> None:
    config = config_file.read(path, TIES)
    section: Any = config.merge[0]
    assert section.parameters == {"density": 0.3, "rescale": True}
    other = config_file.read(path, [*TIES, "--merge.0.density=0.4"])
    assert config_file.differing_keys(config, other) == ["merge.0.density"]


@pytest.mark.parametrize(
    ("entry", "workers", "message"),
    [
        ('rule = "tie"', 2, 'rule must be one of mean, tokens, radial, .*, got \'tie\'; did you mean "ties"\\?'),
        ('rule = "ties"\ndensty = 1', 2, 'densty is not a known key; did you mean "density"\\?'),
        ('rule = "ties"\ndensity = 2', 2, 'density of rule "ties" must be in \\(0, 1\\], got 2'),
        ('rule = "ties"\ndensity = "x"', 2, 'density of rule "ties" must be in \\(0, 1\\], got \'x\''),
        ('rule = "median"\ndensity = 0.5', 2, 'density must not be given for rule "median", which takes none, got 0.5'),
        ('rule = "ties"\nweight = 2', 2, 'weight must not be given for rule "ties", which takes .*, got 2'),
        ('rule = "slerp"', 2, 't must be given for rule "slerp"'),
        ('rule = "slerp"\nt = 0.5', 4, "rule = 'slerp' takes exactly 2 members, but there are 4 workers"),
        ('rule = "wise_ft"\nomega = 1', 2, "rule = 'wise_ft' takes exactly 1 member, but there are 2 workers"),
        ('rule = "ptm"\nomega = 1', 2, "rule = 'ptm' needs a general model as its first member, and workers' deltas have none"),
        ('rule = "median"\nweights = "tokens"', 2, 'weights must be "equal" for rule "median", which takes no weights, .*'),
        ('rule = "median"\nouter_sharded = true', 2, 'outer_sharded must be false for rule "median", which is not linear, .*'),
        ('auto_rule = "sce"', 2, 'rule must be "auto" if auto_rule or auto_above is given, got "mean"'),
        ('rule = "auto"\nauto_rule = "tokens"', 2, 'auto_rule must not be a weighted mean, .*, got "tokens"'),
        ('rule = "auto"\nauto_rule = "mean"', 2, 'auto_rule must not be a weighted mean, .*, got "mean"'),
        ('rule = "auto"\nauto_rule = "slerp"\nt = 0.5', 3, "auto_rule = 'slerp' takes exactly 2 members, but there are 3 .*"),
    ],
)  # fmt: skip
def test_a_rule_that_does_not_fit_is_refused_by_what_it_lacks(tmp_path: Path, entry: str, workers: int, message: str) -> None:
    with pytest.raises(UserError, match=rf"^config\.merge\[0\]\.{message}$"):
        merges(tmp_path, entry=entry, workers=workers)


def test_a_stored_configuration_with_a_rule_that_is_not_loaded_is_taken_as_it_is(tmp_path: Path) -> None:
    text = config_file.dump(merges(tmp_path)).replace('rule = "mean"', 'rule = "somebodys"\nstrength = 3')
    (tmp_path / "stored.toml").write_text(text)
    section: Any = config_file.read_stored(str(tmp_path / "stored.toml")).merge[0]
    assert (section.rule, section.parameters) == ("somebodys", {"strength": 3})
    with pytest.raises(UserError, match=r"rule must be one of .*, got 'somebodys'"):
        config_file.read(str(tmp_path / "stored.toml"), [])
