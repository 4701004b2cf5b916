"""What ``distmerge anneal`` imports for a run whose record names modules from outside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from distmerge.cli import main, training
from distmerge.config import toml
from distmerge.errors import UserError
from tests.checkpoints.runs import run, write_text


def test_anneal_imports_what_the_user_names_and_nothing_that_the_run_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = run(tmp_path, "run", write_text(tmp_path), window={"every": 8, "blocks": 0})
    stored = (copied / "config.toml").read_text()
    assert "plugins = []\n" in stored
    (copied / "config.toml").write_text(stored.replace("plugins = []\n", 'plugins = ["annealed_rules"]\n'))
    (tmp_path / "annealed_rules.py").write_text("import distmerge as dm\ndm.rule('annealed')(lambda delta, weight: delta[0])\n")
    monkeypatch.chdir(tmp_path)
    flags = ["anneal", str(copied), "--from", "20", "--decay-steps", "20"]
    with pytest.raises(UserError, match=r"annealed_rules' is not imported for .*, or give --plugins annealed_rules"):
        main.run(flags)
    assert "annealed_rules" not in sys.modules and not (copied / "anneals").exists()
    started: list[list[str]] = []

    def train(config: Any, ranks: int, command: list[str]) -> int:
        started.append(command)
        return 1

    monkeypatch.setattr(training, "start", train)
    assert main.run([*flags, "--plugins", "annealed_rules"]) == 1
    assert "annealed_rules" in sys.modules
    (command,) = started
    assert toml.read(command[1], command[2:]).plugins == ("annealed_rules",), "its ranks import the same"
