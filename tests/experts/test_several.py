"""Files of several experts: what each becomes, what is refused, the shipped ones planned."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaConfig

from distmerge.errors import UserError
from distmerge.experts.dry_run import published
from distmerge.experts.group import read
from distmerge.launch.ranks import Place
from tests.ranks import command

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "experts").glob("*.toml"))


@pytest.fixture(scope="module")
def one_billion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The configuration of a 1B model, without weights."""
    folder = tmp_path_factory.mktemp("base")
    LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_files_are_planned(path: Path, one_billion: str) -> None:
    outcome = command(["experts", str(path), "--model.path", one_billion, "--dry-run"])
    assert outcome.status == 0, outcome.stderr
    text = outcome.stdout
    assert text.count("1,235,814,400 parameters") == 3
    plan = read(str(path), [])
    if plan.mode == "side-by-side":
        assert "8 ranks in one job" in text and "11,272,192 of them trained" in text
        assert sum(plan.ranks) == 8
        assert plan.runs[0].stopping.merge_with == ["runs/experts-1b-lora/math", "runs/experts-1b-lora/science"]
        assert "task_arithmetic of 3 models, judged on 3 skills" in text
    else:
        assert plan.ranks == [8, 8, 8]
        assert f"memory per rank: {16 * 1235814400 / 1e9:.1f} GB" in text
        assert f"tokens: {2000 * 8 * 2048 * 8:,} in 2,000 steps" in text
    assert published(plan.runs[0]) == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2000]


SMALL = """
run_dir = "runs"
model = { path = "base" }
data = { source = "files", files = ["a.txt"] }
"""


def plan_of(tmp_path: Path, text: str, *overrides: str):
    (tmp_path / "experts.toml").write_text(text)
    return read(str(tmp_path / "experts.toml"), list(overrides))


def test_an_expert_is_the_shared_sections_and_its_own(tmp_path: Path) -> None:
    text = SMALL + '[[experts]]\nskill = "a"\n[[experts]]\nskill = "b"\nranks = 2\n[experts.data]\nfiles = ["b.txt"]\n'
    plan = plan_of(tmp_path, text, "--steps", "7")
    assert [run.run_dir for run in plan.runs] == ["runs/a", "runs/b"]
    assert [run.data.files for run in plan.runs] == [["a.txt"], ["b.txt"]]
    assert [run.steps for run in plan.runs] == [7, 7] and plan.ranks == [1, 2]
    assert [run.expert and run.expert.skill for run in plan.runs] == ["a", "b"]


def test_ranks_find_their_expert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    text = 'mode = "side-by-side"\n' + SMALL + '[[experts]]\nskill = "a"\nranks = 2\n[[experts]]\nskill = "b"\n'
    plan = plan_of(tmp_path, text)
    found = [plan.place_of(Place(rank, 3, rank, 3)) for rank in range(3)]
    assert [place for _, place in found] == [Place(0, 2, 0, 3, "a"), Place(1, 2, 1, 3, "a"), Place(0, 1, 2, 3, "b")]
    assert [run.run_dir for run, _ in found] == ["runs/a", "runs/a", "runs/b"]
    with pytest.raises(UserError, match="these experts need 3 ranks, got 2"):
        plan.place_of(Place(0, 2, 0, 2))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SMALL, "config.experts must be given"),
        (SMALL + '[[experts]]\nskill = "a"\n[[experts]]\nskill = "a"\n', "must have different skills, got a, a"),
        (SMALL + '[[experts]]\nskil = "a"\n', r"config.experts\[0\] must have a skill"),
        (
            SMALL + '[[experts]]\nskill = "a"\nstep = 3\n',
            r'config.experts\[0\]: config.step is not a known key; did you mean "steps"',
        ),
        (
            SMALL + 'stopping = { rule = "merged", merge_with = ["siblings"] }\n[[experts]]\nskill = "a"\n',
            'config.mode must be "side-by-side"',
        ),
        (
            'mode = "both"\n' + SMALL + '[[experts]]\nskill = "a"\n',
            "config.mode must be 'side-by-side' or 'in-turn', got 'both'",
        ),
        (
            SMALL + 'stopping = { rule = "merged", merge_with = ["x"] }\n[[experts]]\nskill = "a"\n',
            r"config.experts\[0\]: config.checkpoint.at must be given",
        ),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(tmp_path, text)
