"""The public protocol of a merger, the mergers that have it, and those from outside of the package."""

from __future__ import annotations

import inspect
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import distmerge as dm
from distmerge.config import toml
from distmerge.workers.merger import MEMBERS, Merger, check_merger
from tests import jobs
from tests.ranks import Ranks
from tests.test_train import FAST

GOSSIP = '''
"""A merger that is no part of distmerge: every worker takes the mean of its own parameters and its neighbour's."""

import time

import torch
import torch.distributed as dist

import distmerge as dm


class Gossip(dm.Merger):
    def __init__(self, flat, group=None, every=5, share=0.5):
        self.flat, self.group, self.every, self.share = flat, group, every, share
        self.steps, self.sent, self.tokens = 0, 0.0, 0.0

    def due(self):
        return (self.steps + 1) % self.every == 0

    def step(self, tokens=1.0):
        self.steps += 1
        self.tokens += float(tokens)
        return self.merge(self.share) if self.steps % self.every == 0 else None

    def finish(self):
        return self.merge(0.5)

    @torch.no_grad()
    def merge(self, share):
        began = time.perf_counter()
        self.flat.pull()
        vector = self.flat.vector
        total = vector.clone()
        dist.all_reduce(total, group=self.group)
        vector.lerp_(total - vector, share)  # of two workers, the other one's parameters
        self.flat.push()
        self.round += 1
        self.sent += 4.0 * vector.numel()
        seconds = time.perf_counter() - began
        return dm.MergeReport(self.round, self.every, None, None, 1, 4.0 * vector.numel(), seconds, seconds)

    @property
    def bytes_sent(self):
        return self.sent

    @property
    def collectives(self):
        return self.round

    def state_dict(self):
        return {"round": self.round, "steps": self.steps, "sent": self.sent, "tokens": self.tokens}

    def load_state_dict(self, state):
        self.round, self.steps, self.sent = state["round"], state["steps"], state["sent"]
        self.tokens = state["tokens"]


class NoMerger:
    """It can step, and that is all."""

    def __init__(self, flat, group=None):
        self.flat = flat

    def step(self, tokens=1.0):
        return None


class Unfinished(dm.Merger):
    def step(self, tokens=1.0):
        return None
'''

MERGE = '[[merge]]\nkind = "diloco"\nevery = 7\nouter_momentum = 0.5\n'
OURS = [
    lambda model: dm.DiLoCo(model, every=2),
    lambda model: dm.DiLoCo(model, every=2, outer_lr=1.0, outer_momentum=0.0),
    lambda model: dm.SPARTA(model, fraction=0.5),
]


def members_of_ours() -> list[list[str]]:
    """What each of our mergers lacks of the protocol, before and after a merge."""
    lacking = []
    for make in OURS:
        model = nn.Linear(3, 2)
        merger = make(model)
        for _ in range(2):
            merger.step(3.0)
        merger.finish()
        assert isinstance(merger, Merger)
        assert merger.round and merger.bytes_sent > 0 and merger.collectives > 0
        merger.load_state_dict(merger.state_dict())
        lacking.append([name for name in MEMBERS if not hasattr(merger, name)])
    return lacking


def test_our_mergers_have_every_member(ranks: Ranks) -> None:
    assert ranks.run(2, members_of_ours) == [[[], [], []]] * 2


def test_the_protocol_is_public_and_every_member_is_described() -> None:
    assert dm.Merger is Merger
    attributes = inspect.getdoc(Merger) or ""
    for name in MEMBERS:
        assert f"\n    {name}:" in attributes or inspect.getdoc(inspect.getattr_static(Merger, name)), name


class Least(dm.Merger):
    """What one has to write at the least."""

    def __init__(self, model: nn.Module):
        self.flat, self.seen = dm.flatten(model), []

    def step(self, tokens: float | Tensor = 1.0) -> dm.MergeReport | None:
        self.seen.append(tokens)
        return None

    def due(self) -> bool:
        return False

    def finish(self) -> dm.MergeReport | None:
        return None


def composed() -> tuple[list[float], float, bool]:
    model = nn.Linear(3, 2)
    least = Least(model)
    merger = dm.compose(least, dm.DiLoCo(model, every=2))
    for _ in range(2):
        merger.step(5.0)
    return least.seen, merger.bytes_sent, merger.due()


def test_a_merger_of_three_methods_composes_with_ours(ranks: Ranks) -> None:
    for seen, sent, due in ranks.run(2, composed):
        assert (seen, due) == ([5.0, 5.0], False)
        assert sent > 0


def test_what_is_no_merger_is_told_what_it_lacks() -> None:
    assert check_merger(least := Least(nn.Linear(2, 2)), "it") is least
    with pytest.raises(dm.UserError, match=r"it must be a merger .*, but it has no anchor, bytes_sent, collectives, due"):
        check_merger(nn.Linear(2, 2), "it")


# ---- from a configuration


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module that holds mergers."""
    (tmp_path / "gossip_module.py").write_text(GOSSIP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "gossip_module", raising=False)
    return tmp_path


def with_merge(folder: Path, entry: str) -> str:
    return jobs.write_config(folder, jobs.CONFIG.replace(MERGE, "[[merge]]\n" + entry))


def in_folder(folder: str, arguments: list[str]) -> Any:
    """``distmerge ARGUMENTS`` as a rank whose working directory is ``folder``."""
    import os

    from tests.ranks import command

    before, paths = os.getcwd(), list(sys.path)
    os.chdir(folder)
    sys.modules.pop("gossip_module", None)
    try:
        return command(arguments)
    finally:
        os.chdir(before)
        sys.path[:] = paths
        sys.modules.pop("gossip_module", None)


def train_outside(ranks: Ranks, folder: Path, *arguments: str) -> tuple[list[int], str]:
    outcomes = ranks.run(2, in_folder, str(folder), ["train", *arguments], group=False)
    return [outcome.status for outcome in outcomes], "".join(outcome.stderr for outcome in outcomes)


def test_a_merger_from_outside_trains_and_resumes_to_the_bit(ranks: Ranks, outside: Path) -> None:
    path = with_merge(outside, 'kind = "gossip_module:Gossip"\nevery = 5\nshare = 0.25\n')
    whole, parts = outside / "whole", outside / "parts"
    assert train_outside(ranks, outside, path, *FAST, "--run-dir", str(whole))[0] == [0, 0]
    for steps in ("8", "12"):
        status, said = train_outside(ranks, outside, path, *FAST, "--run-dir", str(parts), "--steps", steps)
        assert status == [0, 0], said
    assert jobs.final_bytes(parts) == jobs.final_bytes(whole)
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["bytes_sent"] == 4 * summary["parameters"] * 3  # at steps 5 and 10, and at the end
    stored = (whole / "config.toml").read_text()
    assert tomllib.loads(stored)["merge"] == [{"kind": "gossip_module:Gossip", "every": 5, "share": 0.25}]


def test_keys_of_a_merger_from_outside_are_free(outside: Path) -> None:
    path = with_merge(outside, 'kind = "gossip_module:Gossip"\nshare = 0.5\nnames = ["a", "b"]\n')
    config = toml.read(path, ["--merge.0.share", "0.125", "--merge.0.fast", "true", "--merge.0.curve", "1-sqrt"])
    entry: Any = config.merge[0]
    assert entry.arguments == {"share": 0.125, "names": ["a", "b"], "fast": True, "curve": "1-sqrt"}
    (outside / "again.toml").write_text(toml.dump(config))
    assert toml.read(str(outside / "again.toml"), []) == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ('kind = "gossip_module:NoMerger"', "has no anchor, bytes_sent, collectives, due, every, finish, load_state_dict"),
        ('kind = "gossip_module:Unfinished"', "has no due, finish"),
        ('kind = "gossip_module:Gossip"\nrate = 3', "'gossip_module:Gossip': got an unexpected keyword argument 'rate'"),
        ('kind = "gossip_module:nothing"', "must name a class of the module gossip_module, got 'nothing'"),
        (
            'kind = "no_such_module:Gossip"',
            "config.merge[0].kind: there is no module no_such_module on Python's path or in ",
        ),
    ],
)
def test_a_merger_that_does_not_fit_is_refused_in_one_line(ranks: Ranks, outside: Path, entry: str, message: str) -> None:
    status, said = train_outside(ranks, outside, with_merge(outside, entry), *FAST)
    assert 2 in status
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert message in line


def test_a_run_directory_imports_nothing(outside: Path) -> None:
    """Neither where its configuration is compared, nor where it is given as one, unless the command line names the module."""
    run = outside / "run"
    (run / "checkpoints").mkdir(parents=True)
    (outside / "planted.py").write_text("raise SystemExit('imported')")
    text = toml.dump(toml.read(with_merge(outside, 'kind = "gossip_module:Gossip"\n'), []))
    planted = 'plugins = ["planted"]\n' + text.replace("gossip_module", "planted").replace("plugins = []\n", "")
    (run / "config.toml").write_text(planted)
    stored = toml.read_stored(str(run / "config.toml"))
    assert (stored.plugins, stored.merge[0].kind) == (("planted",), "planted:Gossip")
    with pytest.raises(dm.UserError, match=r"'planted' is not imported for .*, a run directory's own record"):
        toml.read(str(run / "config.toml"), [])
    with pytest.raises(SystemExit, match=r"imported"):
        toml.read(str(run / "config.toml"), ["--plugins", "planted"])


def test_the_working_directory_is_searched_as_python_m_does(outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(outside))])
    assert toml.read(with_merge(outside, 'kind = "gossip_module:Gossip"\n'), []).merge[0].kind == "gossip_module:Gossip"
    (outside / "broken_module.py").write_text("import no_such_package")
    with pytest.raises(dm.UserError, match=r"config.plugins: broken_module imports no_such_package, which is not installed"):
        toml.read(with_merge(outside, 'kind = "none"\n'), ["--plugins", "broken_module"])
    (outside / "raising_module.py").write_text("1 / 0")
    with pytest.raises(dm.UserError, match=r"raising_module cannot be imported: ZeroDivisionError: division by zero"):
        toml.read(with_merge(outside, 'kind = "none"\n'), ["--plugins", "raising_module"])
