"""What draws pictures says before its work that it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests import jobs
from tests.ranks import command
from tests.test_cli import error_of


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ("ptm {0}/config.toml", "distmerge ptm"),
        ("examples {0} --merged {0}", "distmerge examples"),
        ("sweep --method ties --model a --grid lambda=1 --skill a=b --plot {0}/plots", "--plot"),
        ("diagnose a b --base c --plot {0}/plots", "--plot"),
        ("window {0} --plot {0}/window.svg", "--plot"),
    ],
)
def test_pictures_ask_for_matplotlib_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, what: str
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    jobs.write_config(tmp_path)
    said = error_of(command(arguments.format(tmp_path).split()))
    assert said == f"{what} needs matplotlib to draw figures: pip install 'distmerge[plot]'"
