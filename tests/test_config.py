"""The configuration: every user's mistake is one line that names the key, its value and what is allowed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from distmerge.config import toml as config_file
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.rundir.layout import RunDirectory

BASE = """
run_dir = "run"
[mesh]
workers = 2
[model.config]
model_type = "llama"
hidden_size = 16
[[merge]]
kind = "diloco"
every = 20
"""

KINDS = "'diloco', 'paper-diloco', 'streaming-diloco', 'average', 'local-sgd', 'sparta', 'none'"


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "base.toml").write_text(BASE)
    return str(tmp_path / "base.toml")


def error_of(toml: str, tmp_path: Path) -> str:
    (tmp_path / "case.toml").write_text(toml)
    with pytest.raises(UserError) as caught:
        config_file.read(str(tmp_path / "case.toml"), [])
    return str(caught.value)


# ---- reading


def test_defaults(path: str) -> None:
    config = config_file.read(path, [])
    assert (config.seed, config.steps, config.run_dir) == (0, 400, "run")
    assert config.merge[0].kind == "diloco"
    assert config.model_dump()["merge"][0] == {
        "kind": "diloco", "every": 20, "outer_lr": 0.7, "outer_momentum": 0.5, "nesterov": True, "bucket_bytes": 64 * 2**20,
        "fragments": 1, "fragment_order": "strided", "fragment_patterns": (), "overlap": 0, "mix": 0.0, "wire": "fp32",
        "error_feedback": False, "rule": "mean", "weights": "equal", "auto_rule": "ties", "auto_above": 0.9,
        "outer_sharded": False, "outer_device": None, "nonfinite": "raise",
    }  # fmt: skip


def test_only_run_dir_and_model_have_no_default() -> None:
    assert [name for name, field in TrainConfig.model_fields.items() if field.is_required()] == ["run_dir", "model"]


def test_frozen(path: str) -> None:
    config = config_file.read(path, [])
    with pytest.raises(ValidationError):
        config.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("shipped", sorted(Path("configs").glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_configurations_survive_their_own_dump(shipped: Path, tmp_path: Path) -> None:
    config = config_file.read(str(shipped), [])
    (tmp_path / "dump.toml").write_text(config_file.dump(config))
    again = config_file.read(str(tmp_path / "dump.toml"), [])
    assert again == config
    assert config_file.differing_keys(config, again) == []


# ---- mistakes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("step = 3", 'config.step is not a known key; did you mean "steps"?'),
        ("[train]\nbatch_sise = 3", 'config.train.batch_sise is not a known key; did you mean "batch_size"?'),
        ("[[merge]]\nkind = \"diloco\"\nevry = 3", 'config.merge[1].evry is not a known key; did you mean "every"?'),
        ("[engine]\nxyzzy = 3", "config.engine.xyzzy is not a known key; known: config, kind, reshard_after_forward"),
        ('steps = "many"', "config.steps must be an integer, got 'many'"),
        ("steps = 2.5", "config.steps must be an integer, got 2.5"),
        ("steps = 0", "config.steps must be >= 1, got 0"),
        ("seed = -1", "config.seed must be >= 0, got -1"),
        ("train = 3", "config.train must be a table, got 3"),
        ("[train]\ncompile = \"maybe\"", "config.train.compile must be true or false, got 'maybe'"),
        ("[train]\nprecision = \"fp8\"", "config.train.precision must be 'float32' or 'bfloat16', got 'fp8'"),
        ("[optimizer]\nlr = inf", "config.optimizer.lr must be finite, got inf"),
        ("[optimizer]\nlr = 0", "config.optimizer.lr must be > 0, got 0"),
        ("[optimizer]\nlr = \"x\"", "config.optimizer.lr must be a number, got 'x'"),
        ("[optimizer]\nbetas = 0.9", "config.optimizer.betas must be a list, got 0.9"),
        ("[optimizer]\nbetas = [0.9]", "config.optimizer.betas[1] must be given"),
        ("[optimizer]\nbetas = [0.9, 0.9, 0.9]", "config.optimizer.betas must be at most 2 long, got [0.9, 0.9, 0.9]"),
        ("[optimizer]\nbetas = [0.9, 1.5]", "config.optimizer.betas[1] must be < 1, got 1.5"),
        ("[schedule]\nfloor = 2", "config.schedule.floor must be <= 1, got 2"),
        ("[schedule]\nname = \"wsd\"", 'config.schedule.decay must be >= 1 for schedule.name "wsd", got 0'),
        ("[schedule]\nwarmup = 300\ndecay = 200", "config.schedule.warmup + decay must be <= steps = 400, got 300 + 200"),
        ("[[merge]]\nkind = \"diloco\"\nevery = 0", "config.merge[1].every must be >= 1, got 0"),
        ("[[merge]]\nkind = \"diloco\"\nouter_momentum = 1", "config.merge[1].outer_momentum must be < 1, got 1"),
        ("[[merge]]\nkind = \"none\"\nevery = 3", 'config.merge[1].every is not a known key; known: kind'),
        ("[[merge]]\nkind = \"dilico\"", f"config.merge[1].kind must be one of {KINDS}, got 'dilico'"),
        ("[[merge]]\nevery = 3", f"config.merge[1].kind must be one of {KINDS}, and is not given"),
        ("[data]\nsource = \"files\"", 'config.data.files must be given exactly when data.source is "files", got []'),
        ("[data]\nfiles = [\"a\"]", "config.data.files must be given exactly when data.source is \"files\", got ['a']"),
        ("[data]\nsource = \"hub\"", 'config.data.dataset must be given exactly when data.source is "hub", got None'),
        ("[data]\neval_fraction = 1", "config.data.eval_fraction must be < 1, got 1"),
        ("[data]\nsequence_length = 1", "config.data.sequence_length must be >= 2, got 1"),
    ],
)  # fmt: skip
def test_mistakes(change: str, message: str, tmp_path: Path) -> None:
    said = error_of(change + "\n" + BASE if "\n" not in change and "[" not in change else BASE + change, tmp_path)
    assert said == message
    assert "\n" not in said


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('run_dir = "run"', "", "config.run_dir must be given"),
        ('[model.config]\nmodel_type = "llama"\nhidden_size = 16', "", "config.model must be given"),
        (
            "[model.config]",
            '[model]\npath = "x"\n[model.config]',
            "config.model.path must be given exactly when config is not, got both",
        ),
        ('model_type = "llama"', "", 'config.model.config must have model_type, such as "llama"'),
        ("workers = 2", "workers = 1", "config.mesh.workers must be >= 2 for a [[merge]] of kind diloco, got 1"),
        (
            '[[merge]]\nkind = "diloco"\nevery = 20',
            "",
            "config.merge must have an entry when mesh.workers is 2, got none "
            '(kind = "none" for workers that merge only at the end)',
        ),
        ("[[merge]]", "[merge]", "config.merge must be a list, got {'kind': 'diloco', 'every': 20}"),
    ],
)
def test_what_must_go_together(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in BASE
    assert error_of(BASE.replace(old, new), tmp_path) == message


# ---- overrides


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        ("--steps 7", "steps", 7),
        ("--steps=7", "steps", 7),
        ("--run-dir x", "run_dir", "x"),
        ("--run_dir x", "run_dir", "x"),
        ("--mesh.workers 4", "mesh.workers", 4),
        ("--merge.0.every 3", "merge.0.every", 3),
        ("--merge.0.nesterov false", "merge.0.nesterov", False),
        ("--merge.1.kind average --merge.1.every 5", "merge.1.every", 5),
        ("--train.compile", "train.compile", True),
        ("--train.compile true --train.gradient-clip 0", "train.compile", True),
        ("--optimizer.betas 0.5 0.6", "optimizer.betas", (0.5, 0.6)),
        ("--data.source files --data.files a b", "data.files", ["a", "b"]),
        ("--optimizer.lr 1e-4", "optimizer.lr", 1e-4),
        ("--model.config.hidden-size 32", "model.config.hidden_size", 32),
        ("--model.config.rope-theta 1e6", "model.config.rope_theta", 1e6),
        ("--model.config.hidden-act gelu", "model.config.hidden_act", "gelu"),
        ("--model.config.tie-word-embeddings true", "model.config.tie_word_embeddings", True),
        ("--steps 7 --steps 9", "steps", 9),
    ],
)
def test_overrides(path: str, arguments: str, key: str, value: Any) -> None:
    place: Any = config_file.read(path, arguments.split()).model_dump()
    for part in key.split("."):
        place = place[int(part)] if part.isdigit() else place[part]
    assert place == value
    assert type(place) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("stray", "expected --section.key value, got stray"),
        ("--steps", "--steps needs a value"),
        ("--merge.0.every", "--merge.0.every needs a value"),
        ("--verbos", "config.verbos is not a known key; did you mean"),
        ("--steps 3 4", "--steps takes one value, got 3 4"),
        ("--stepz 3", 'config.stepz is not a known key; did you mean "steps"?'),
        ("--merge.2.every 3", "--merge.2.every does not lead to a key of the configuration"),
        ("--merge.every 3", "--merge.every does not say which [[merge]]; did you mean --merge.0.every?"),
        ("--merge.x.every 3", "--merge.x.every does not lead to a key of the configuration"),
        ("--optimizer.learning-rate 3", 'config.optimizer.learning_rate is not a known key; did you mean "lr"?'),
        ("--run-dir.x 3", "--run_dir.x does not lead to a key of the configuration"),
        ("--mesh 3", "config.mesh must be a table, got '3'"),
        (
            "--merge.1.every 3",
            f"config.merge[1].kind must be one of {KINDS}, and is not given",
        ),
    ],
)
def test_overrides_that_are_wrong(path: str, arguments: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        config_file.read(path, arguments.split())
    assert str(caught.value).startswith(message)


AVERAGE = ("bucket_bytes", "error_feedback", "every", "kind", "nonfinite", "wire")


@pytest.mark.parametrize(
    ("overrides", "keys"),
    [
        ("--steps 9 --log.every 3 --evaluate.sequences 2 --checkpoint.keep 9 --train.threads 3 --run-dir y", []),
        ("--seed 3", ["seed"]),
        ("--merge.0.every 3 --optimizer.betas 0.1 0.2", ["merge.0.every", "optimizer.betas"]),
        ("--merge.1.kind average", [f"merge.1.{key}" for key in AVERAGE]),
        ("--model.config.hidden-size 32 --train.gradient-clip 9", ["model.config.hidden_size", "train.gradient_clip"]),
    ],
)
def test_differing_keys(path: str, overrides: str, keys: list[str]) -> None:
    stored, changed = config_file.read(path, []), config_file.read(path, overrides.split())
    assert config_file.differing_keys(stored, changed) == keys
    assert config_file.differing_keys(changed, stored) == keys


def test_dump_is_toml_of_all_that_is_set(path: str) -> None:
    config = config_file.read(path, [])
    table = tomllib.loads(config_file.dump(config))
    assert table["merge"][0]["outer_lr"] == 0.7
    assert "path" not in table["model"]
    assert config_file.validate(table) == config


# ---- defaults that depend on the run


def merges(tmp_path: Path, steps: int = 400, workers: int = 2, entry: str = "", kind: str = "diloco", name: str = "r") -> Any:
    text = BASE.replace('run_dir = "run"', f'run_dir = "{tmp_path / name}"\nsteps = {steps}')
    text = text.replace("workers = 2", f"workers = {workers}")
    (tmp_path / "case.toml").write_text(text.replace('kind = "diloco"\nevery = 20', f'kind = "{kind}"\n{entry}'))
    return config_file.read(str(tmp_path / "case.toml"), [])


@pytest.mark.parametrize(
    ("steps", "workers", "every", "outer_lr"), [(400, 2, 10, 0.7), (2000, 3, 20, 0.7), (5000, 4, 50, 1.0), (10**6, 8, 100, 1.0)]
)
def test_diloco_chooses_by_workers_and_steps(tmp_path: Path, steps: int, workers: int, every: int, outer_lr: float) -> None:
    entry = merges(tmp_path, steps, workers).merge[0]
    assert (entry.every, entry.outer_lr, entry.outer_momentum) == (every, outer_lr, 0.5)


def test_what_is_given_is_not_chosen(tmp_path: Path) -> None:
    entry = merges(tmp_path, entry="every = 7\nouter_momentum = 0.9").merge[0]
    assert (entry.every, entry.outer_lr, entry.outer_momentum) == (7, 0.7, 0.9)


def test_presets_are_the_papers_or_what_was_measured(tmp_path: Path) -> None:
    paper = merges(tmp_path, workers=4, kind="paper-diloco").merge[0]
    streaming = merges(tmp_path, workers=4, kind="streaming-diloco", entry="fragments = 9\noverlap = 1").merge[0]
    assert (paper.outer_lr, paper.outer_momentum) == (0.7, 0.9)
    assert (streaming.outer_lr, streaming.outer_momentum, streaming.mix, streaming.every) == (1.0, 0.5, 0.0, 18)


def test_a_resume_keeps_what_its_run_chose(tmp_path: Path) -> None:
    """Also where it trains for longer, which would choose another interval."""
    first = merges(tmp_path, steps=400)
    run = RunDirectory(first.run_dir)
    run.check(first)
    run.begin(first, [])
    assert tomllib.loads(run.config.read_text())["merge"][0]["every"] == 10
    longer = merges(tmp_path, steps=5000)
    run.check(longer)
    assert longer.merge == first.merge
    assert merges(tmp_path, steps=5000, name="another").merge[0].every == 50
    with pytest.raises(UserError, match=r"differing keys: merge\.0\.every"):
        run.check(merges(tmp_path, steps=5000, entry="every = 50"))


def test_a_run_of_few_merges_is_told_so_in_one_line(tmp_path: Path) -> None:
    few = merges(tmp_path, steps=400, entry="every = 20").merge[0]
    assert merges(tmp_path, steps=400).merge[0].warning(400) is None
    assert few.warning(400) == (
        "400 steps with every = 20 give 20 merges; with fewer than about 30, merging raises the loss by several percent: "
        "lower every, or train for longer"
    )


def test_sparta_refuses_a_delay_beyond_its_cycle(tmp_path: Path) -> None:
    merges(tmp_path, kind="sparta", entry="fraction = 0.05\nevery = 2\ndelay = 40")
    merges(tmp_path, kind="sparta", entry='fraction = 0.05\ndelay = 50\nselector = "random"')
    with pytest.raises(UserError) as caught:
        merges(tmp_path, kind="sparta", entry="fraction = 0.05\ndelay = 50")
    assert str(caught.value) == (
        'config.merge[0].delay must be <= 20 steps for selector "partitioned", a cycle of 1 / fraction rounds, after which the '
        "same parameters are sent again, got 50"
    )
