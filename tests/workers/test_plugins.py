"""A package of somebody else with a rule and a merger, used by their names: installed, or in the working directory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import distmerge as dm
from distmerge.config import toml
from distmerge.rules import catalogue
from distmerge.rules.protocol import Target
from tests import jobs
from tests.ranks import Outcome, Ranks, command
from tests.test_train import FAST
from tests.workers.test_merger import GOSSIP

RULE = '''
"""A rule that is no part of distmerge."""

import torch

import distmerge as dm


@dm.rule("{name}", parameters={{"quorum": 0.5}})
class Agreed(dm.Rule):
    """The mean delta where at least a quorum of the members moves the same way; elsewhere nothing moves."""

    def __init__(self, target):
        self.weights = torch.tensor([one["weight"] for one in target.each])
        self.quorum = target.shared["quorum"]

    def merge(self, block, state):
        delta = torch.stack([member.float() for member in block.members])
        mean = (delta * self.weights[:, None]).sum(0) / self.weights.sum()
        alike = (delta.sign() == mean.sign()).float().mean(0)
        return torch.where(alike >= self.quorum, mean, 0.0)
'''

MERGE = '[[merge]]\nkind = "diloco"\nevery = 7\nouter_momentum = 0.5\n'


def write_package(folder: Path, module: str, rule: str) -> None:
    """A package with metadata as pip installs it, whose entry point offers a rule."""
    package, metadata = folder / module, folder / f"{module}-1.0.dist-info"
    package.mkdir(parents=True)
    metadata.mkdir()
    (package / "__init__.py").write_text(GOSSIP)
    (package / "agreed.py").write_text(RULE.format(name=rule))
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[distmerge.rules]\n{rule} = {module}.agreed\n")


def merged_by(rule: str, quorum: float) -> list[float]:
    deltas = [torch.tensor([1.0, 1.0, -2.0]), torch.tensor([3.0, -2.0, -4.0]), torch.tensor([2.0, -2.0, 3.0])]
    from distmerge.rules.protocol import run

    target = Target("w", (3,), ({"weight": 1.0},) * 3, {"quorum": quorum})
    return run(catalogue.build(rule, target), deltas).tolist()


def test_a_rule_of_an_installed_package_is_known_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its module is imported when the name is first asked for, and not before."""
    write_package(tmp_path, "installed_package", "agreed-installed")
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = '[[merge]]\nkind = "diloco"\nevery = 7\nrule = "agreed-installed"\nquorum = 0.75\n'
    path = jobs.write_config(tmp_path, jobs.CONFIG.replace(MERGE, entry))
    stored = toml.read_stored(path)
    assert "installed_package.agreed" not in sys.modules, "a run directory's configuration loads nothing"
    config = toml.read(path, [])
    section: Any = config.merge[0]
    assert (section.rule, section.parameters) == ("agreed_installed", {"quorum": 0.75})
    assert toml.validate(stored.model_dump(mode="json", exclude_none=True, by_alias=True)) == config
    assert merged_by("agreed_installed", 0.6) == [2.0, -1.0, -1.0]
    assert merged_by("agreed_installed", 0.75) == [2.0, 0.0, 0.0]


def test_a_plugin_of_the_working_directory_is_a_line_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "beside_module.py").write_text(RULE.format(name="agreed-beside"))
    monkeypatch.chdir(tmp_path)
    entry = '[[merge]]\nkind = "diloco"\nevery = 7\nrule = "agreed-beside"\n'
    path = jobs.write_config(tmp_path, jobs.CONFIG.replace(MERGE, entry))
    with pytest.raises(dm.UserError, match=r"rule must be one of .*, got 'agreed-beside'"):
        toml.read(path, [])
    config = toml.read(path, ["--plugins", "beside_module"])
    assert (config.plugins, config.merge[0].kind) == (("beside_module",), "diloco")
    with pytest.raises(dm.UserError, match=r"config\.merge\[0\]\.quorum of rule \"agreed_beside\" must be a finite number"):
        toml.read(path, ["--plugins", "beside_module", "--merge.0.quorum", "many"])


def with_package(folder: str, arguments: list[str]) -> Outcome:
    """``distmerge ARGUMENTS`` as a rank where the package in ``folder`` is installed."""
    before, here = list(sys.path), os.getcwd()
    sys.path.insert(0, folder)
    os.chdir(folder)
    try:
        return command(arguments)
    finally:
        sys.path[:] = before
        os.chdir(here)


def test_a_merger_of_an_installed_package_trains(ranks: Ranks, tmp_path: Path) -> None:
    write_package(tmp_path, "merging_package", "agreed-trained")
    entry = '[[merge]]\nkind = "merging_package:Gossip"\nevery = 4\n'
    path = jobs.write_config(tmp_path, jobs.CONFIG.replace(MERGE, entry))
    outcomes = ranks.run(2, with_package, str(tmp_path), ["train", path, *FAST], group=False)
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()


def test_a_rule_of_the_working_directory_trains_and_resumes_bit_by_bit(ranks: Ranks, tmp_path: Path) -> None:
    """Stopped in mid-round and taken up again; where auto takes it, the run's events say so by its name."""
    (tmp_path / "trained_module.py").write_text(RULE.format(name="agreed-resumed"))
    entry = '[[merge]]\nkind = "diloco"\nevery = 3\nouter_momentum = 0.5\nrule = "agreed-resumed"\nquorum = 0.75\n'
    path = jobs.write_config(tmp_path, 'plugins = ["trained_module"]\n' + jobs.CONFIG.replace(MERGE, entry))

    def train(run: str, *more: str) -> Path:
        arguments = ["train", path, *FAST, "--run-dir", str(tmp_path / run), *more]
        outcomes = ranks.run(2, with_package, str(tmp_path), arguments, group=False)
        assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
        return tmp_path / run

    whole, parts = train("whole"), train("parts", "--steps", "8")
    first = jobs.final_bytes(parts)
    train("parts")
    assert jobs.final_bytes(parts) == jobs.final_bytes(whole) != first
    assert jobs.untimed(parts) == jobs.untimed(whole)
    assert jobs.final_bytes(train("easy", "--merge.0.quorum", "0.1")) != jobs.final_bytes(whole), "the rule decides"
    auto = train("auto", "--merge.0.rule", "auto", "--merge.0.auto-rule", "agreed-resumed", "--merge.0.auto-above", "1")
    events = [json.loads(line) for line in (auto / "events.jsonl").read_text().splitlines()]
    assert {event["rule"] for event in events if event["event"] == "rule chosen"} == {"agreed_resumed"}
    assert jobs.final_bytes(auto) == jobs.final_bytes(whole)
