"""The examples of the README, as they stand there, in real ranks."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

from tests.ranks import Ranks

ROOT = Path(__file__).parent.parent

EXAMPLES = {
    f"example {index}": code
    for index, code in enumerate(re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M))
}


def run_example(code: str, folder: Path) -> str:
    """What an example prints; what it writes goes to a folder of its own."""
    out = io.StringIO()
    before = os.getcwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out):
            exec(compile(code, "example", "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)
    return out.getvalue()


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 4
    for word in ("dm.compose", "fully_shard", "deepspeed.initialize", "Trainer("):
        assert any(word in code for code in EXAMPLES.values()), word


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_as_it_stands(ranks: Ranks, tmp_path: Path, name: str) -> None:
    code = EXAMPLES[name]
    if "deepspeed" in code:
        pytest.importorskip("deepspeed")
    world = 4 if "mesh" in code else 2
    said = ranks.run(world, run_example, code, tmp_path, group=False)
    promised = re.search(r"print\(.*\)  # (.*)", code)  # else it says what it sent
    wanted = re.escape(promised[1]) if promised else r"\d+ bytes"
    assert all(re.search(wanted, text) for text in said), said
