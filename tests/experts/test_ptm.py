"""The ptm experiment at its smallest: every arm, its costs, its merges by hand, the page, a second start."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from distmerge.config import toml
from distmerge.errors import UserError
from distmerge.evaluate import evaluate_directory
from distmerge.studies.config import PtmConfig, read
from distmerge.studies.curves import CurvePoint, as_skilled, knee, reached, shape
from distmerge.studies.report import hits
from distmerge.studies.texts import KINDS, kinds_here, write_parts
from tests.checkpoints.runs import BASE, parameters
from tests.jobs import MODEL
from tests.ranks import command

WORDS = {"general": "the a of to and in is it", "sums": "x y z + - = 1 2", "calls": "foo bar baz ( ) ; { }"}

CONFIG = (
    """
out = "{0}/out"
general = ["{0}/general.txt"]
other_general = ["{0}/general.txt"]
characters = 300000
eval_sequences = 16
sequence_length = 32
omegas = [0.5, 1.0]
replay = [0.5]
[skills]
sums = ["{0}/sums.txt"]
calls = ["{0}/calls.txt"]
[steps]
base = 6
general = 8
skill = 4
"""
    + MODEL
    + """[train]
batch_size = 4
"""
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished experiment."""
    made = tmp_path_factory.mktemp("ptm")
    for name, words in WORDS.items():
        draw = random.Random(1)
        lines = (" ".join(draw.choice(words.split()) for _ in range(10)) for _ in range(17000))
        (made / f"{name}.txt").write_text("\n".join(lines))
    (made / "ptm.toml").write_text(CONFIG.format(made))
    outcome = command(["ptm", str(made / "ptm.toml")])
    assert outcome.status == 0, outcome.stderr
    assert json.loads(outcome.stdout)["rule"]["merges"] == 1
    return made


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "results.json").read_text())


def test_every_arm_has_its_cost(folder: Path) -> None:
    found = {(row["skill"], row["arm"]): row["steps"] for row in results_of(folder)["arms"]}
    for skill in ("sums", "calls"):
        steps = {arm: count for (name, arm), count in found.items() if name == skill}
        assert steps == {
            "base": 0, "general": 8, "expert": 4, "cft": 4, "cft 0.25": 1, "cft 0.5": 2,
            "cft+replay 0.5 own": 8, "cft+replay 0.5 other": 8, "rt": 12,
            "ptm at 0.5": 4, "linear at 0.5": 4, "wise-ft at 0.5": 4,
        }  # fmt: skip
    assert {row["tokens"] / row["steps"] for row in results_of(folder)["arms"] if row["steps"]} == {4 * 32}


def test_a_point_is_the_merge_on_disk(folder: Path, tmp_path: Path) -> None:
    seed = folder / "out" / "seed-0"
    given = f"merge --method ptm --base {seed}/base/final --general {seed}/general/final --model {seed}/expert-sums/final"
    outcome = command(f"{given} --out {tmp_path}/merged".split())
    assert outcome.status == 0 and "= 0.5" in outcome.stdout, outcome.stderr
    test = folder / "out" / "texts" / "sums-test.txt"
    wanted = evaluate_directory(str(tmp_path / "merged"), [str(test)], 32, 16).loss
    (point,) = [
        point
        for point in results_of(folder)["seeds"][0]["points"]
        if (point["arm"], point["skill"], point.get("omega")) == ("ptm", "sums", 0.5)
    ]
    assert point["losses"]["sums"] == pytest.approx(wanted, rel=1e-5)
    general = json.loads((seed / "measured.json").read_text())["points"][1]["losses"]["general"]
    by_hand = evaluate_directory(str(seed / "general" / "final"), [str(folder / "out/texts/general-test.txt")], 32, 16).loss
    assert general == pytest.approx(by_hand, rel=1e-5)


def test_the_page_needs_no_other_file(folder: Path) -> None:
    page = (folder / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
    assert "cft+replay 0.5 own" in page and "sums + calls" in page


def test_what_is_finished_is_not_done_again(folder: Path) -> None:
    seed = folder / "out" / "seed-0"
    times = {path: path.stat().st_mtime_ns for path in seed.glob("*/final/model.safetensors")}
    assert len(times) == 16
    before = results_of(folder)
    (seed / "measured.json").unlink()
    summary = seed / "rt-sums" / "summary.json"
    summary.unlink()  # as if this run had been killed at its end
    weights = parameters(seed / "rt-sums" / "final")
    assert command(["ptm", str(folder / "ptm.toml")]).status == 0
    assert results_of(folder) == before
    again = {path: path.stat().st_mtime_ns for path in seed.glob("*/final/model.safetensors")}
    assert [path.parts[-3] for path in times if again[path] != times[path]] == ["rt-sums"]
    assert all(torch.equal(value, weights[name]) for name, value in parameters(seed / "rt-sums" / "final").items())


def test_other_steps_want_another_directory(folder: Path) -> None:
    (folder / "longer.toml").write_text((folder / "ptm.toml").read_text().replace("general = 8", "general = 7"))
    outcome = command(["ptm", str(folder / "longer.toml")])
    assert outcome.status == 2 and "general was trained for 8 steps, but config.steps now says 7" in outcome.stderr


def test_parts_share_no_piece(tmp_path: Path) -> None:
    text = "".join(f"line {index}\n" for index in range(4000))
    paths = write_parts(text, tmp_path, "t", 10**9)
    lines = {part: Path(path).read_text().splitlines() for part, path in paths.items()}
    assert sorted(line for part in lines.values() for line in part) == sorted(text.splitlines())
    assert [round(len(lines[part]) / 4000, 1) for part in ("pretraining", "train", "test")] == [0.2, 0.7, 0.1]
    assert set(kinds_here(["headers", "arithmetic"])) <= set(KINDS)
    assert write_parts(text, tmp_path, "t", 10**9) == paths
    with pytest.raises(UserError, match="holds another text than t has now"):
        write_parts(text + "more\n", tmp_path, "t", 10**9)


def test_the_knee_is_where_the_curve_bends() -> None:
    points = [(0.0, 1.0, 3.0), (0.2, 1.02, 2.0), (0.4, 1.1, 1.2), (0.6, 2.0, 1.1), (1.0, 3.0, 1.0)]
    assert knee([CurvePoint(*point) for point in points]) == 0.4


def test_a_similar_loss_lies_on_a_line_between_two_points() -> None:
    swept = [CurvePoint(*point) for point in [(0.0, 1.0, 3.0), (0.4, 1.2, 2.0), (0.8, 1.6, 1.0), (1.0, 2.0, 1.2)]]
    assert reached(swept, 1.25) == pytest.approx((0.7, 1.5, 1.25))
    assert reached(swept, 2.0) == pytest.approx((0.4, 1.2, 2.0))
    assert reached(swept, 0.9) == (0.8, 1.6, 1.0)
    assert reached(swept, 3.5) == (0.4, 1.2, 2.0)


def test_continued_finetuning_is_compared_at_a_similar_skill_loss() -> None:
    def point(arm: str, general: float, own: float, omega: float | None = None, tokens: int = 0) -> dict[str, Any]:
        return {
            "arm": arm, "skill": "sums", "losses": {"general": general, "sums": own}, "omega": omega, "tokens": tokens,
            "steps": tokens,
        }  # fmt: skip

    swept = [
        point("ptm", 1.2, 2.5, 0.5),
        point("ptm", 1.6, 2.0, 1.0),
        point("wise-ft", 1.1, 2.2, 0.5),
        point("wise-ft", 2.0, 2.0, 1.0),
    ]
    ends = [point("general", 1.0, 3.0), point("cft", 2.0, 2.0, tokens=10), point("rt", 1.1, 2.0, tokens=30)]
    ends += [point("cft 0.5", 1.3, 2.6, tokens=5), point("cft 0.7", 1.5, 2.4, tokens=7)]
    near = shape("sums", [{"points": ends + swept, "omega": {"sums": 0.5}}])
    assert near["similar_omega"] == pytest.approx([0.9]) and near["similar_gap"] == pytest.approx([0.05])
    assert near["similar_excess"] == pytest.approx([2.0 - 1.52]) and near["wise_ft_excess"] == pytest.approx([2.0 - 1.55])
    assert near["cft_general_excess"] == pytest.approx([2.0 - 1.6]) and near["skill_gap"] == [0.0]
    assert near["rt_tokens"] == [30] and near["ptm_tokens"] == [10]
    # PTM at 0.5 has a skill loss of 2.5; the run that comes nearest from above is the one of 5 steps, at 2.6.
    assert near["equal_excess"] == pytest.approx([1.3 - 1.2]) and near["equal_gap"] == pytest.approx([0.1 / 2.5])
    assert near["equal_steps"] == [5]
    runs = [CurvePoint(0.0, 1.0, 3.0), CurvePoint(5.0, 1.3, 2.6), CurvePoint(7.0, 1.5, 2.4)]
    assert [as_skilled(runs, loss) for loss in (2.3, 2.5, 2.6, 2.7)] == [runs[2], runs[1], runs[1], runs[0]]
    swept[1]["losses"]["sums"] = 2.2
    far = shape("sums", [{"points": ends + swept, "omega": {"sums": 0.5}}])
    assert far["similar_omega"] == [1.0] and far["similar_gap"] == far["skill_gap"] == pytest.approx([0.1])
    assert far["cft_general_excess"] == far["similar_excess"] == pytest.approx([0.4]) and far[
        "wise_ft_excess"
    ] == pytest.approx([2.0 - 1.1])


@pytest.mark.parametrize(("skill", "warmup", "decay"), [(70, 35, 35), (10, 1, 9), (100, 50, 50), (3, 0, 1), (70, 10, 35)])
def test_a_shorter_run_has_a_shorter_schedule(skill: int, warmup: int, decay: int) -> None:
    schedule = {"name": "wsd", "warmup": warmup, "decay": decay}
    table = {"out": "x", "model": BASE["model"], "steps": {"skill": skill}, "schedule": schedule}
    config = toml.validate_as(PtmConfig, table)
    for share in (0.01, 0.29, 0.5, 0.99):
        run = config.run(0, "shorter", config.steps_of(share), ["text"], "base", share)
        assert run.schedule.warmup + run.schedule.decay <= run.steps == max(1, round(share * skill))
        assert run.schedule.warmup <= round(share * warmup) and 1 <= run.schedule.decay <= max(1, round(share * decay))


def test_the_shipped_file_is_read() -> None:
    config = read(str(Path(__file__).parents[2] / "configs" / "ptm" / "stdlib.toml"), {"seeds": [7]})
    run = config.run(7, "expert-code", config.steps.skill, ["code.txt"], "base", expert={"skill": "code"})
    assert (run.run_dir, run.seed, run.steps, run.optimizer.lr) == ("runs/ptm/seed-7/expert-code", 7, 200, 1e-3)
    assert run.model.path == "base" and run.expert and run.expert.skill == "code"


def test_hits_are_counted() -> None:
    entry = {"chosen": "ties", "best": "ties", "best_of_all": "task_arithmetic 0.5"}
    found = hits([entry, entry | {"best": "mean"}])
    assert (found["merges"], found["best_of_its_own"], found["best_of_all"]) == (2, 1, 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"omegas": [0.5, 0.2]}, "omegas must be > 0 and ascend"),
        ({"replay": [1.0]}, "replay must be shares between 0 and 1"),
        ({"shorter": [0.5, 0.5]}, "shorter must be different shares between 0 and 1"),
        ({"seeds": [1, 1]}, "seeds must differ"),
        ({"skills": {"general": []}}, "skills must have a word as a name, other than general and other, got 'general'"),
        ({"skills": {"a/b": []}}, "skills must have a word as a name"),
        ({"step": 1}, 'config.step is not a known key; did you mean "steps"'),
    ],
)
def test_mistakes(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        toml.validate_as(PtmConfig, {"out": "x", "model": BASE["model"]} | keys)


def test_what_the_last_run_would_refuse_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "ptm.toml").write_text(CONFIG.format(tmp_path) + '[schedule]\nname = "wsd"\ndecay = 5\n')
    with pytest.raises(UserError, match=r"schedule.warmup \+ decay must be <= steps = 4, got 0 \+ 5"):
        read(str(tmp_path / "ptm.toml"), {})
