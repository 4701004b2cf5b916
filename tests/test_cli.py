"""The command line: a user's mistake is one line on stderr and status 2, before a rank is launched where it can be known."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import distmerge.launch.ranks
from distmerge.rundir.layout import Lock, RunDirectory
from tests import jobs
from tests.ranks import Outcome, Ranks, command

VERBS = ("train", "eval", "build-ops", "merge", "diagnose", "sweep", "window", "anneal", "recover", "verify")
VERBS += ("experts", "examples", "ptm")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration that trains, and inputs that do not."""
    folder = tmp_path_factory.mktemp("cli")
    jobs.write_config(folder)
    (folder / "broken.toml").write_text("steps = = 3")
    (folder / "short.txt").write_text("a b c\n" * 400)
    (folder / "table.csv").write_text("a,b\n")
    (folder / "null.jsonl").write_text('{"text": "a"}\n{"text": null}\n')
    (folder / "numbers.jsonl").write_text('{"text": 1}\n{"text": 2}\n')
    (folder / "other.jsonl").write_text('{"body": "a"}\n{"body": "b"}\n')
    (folder / "cut.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.parquet").write_text("no parquet")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps({"text": f"{index} words " * 40}) for index in range(60)))
    return folder


@pytest.fixture(autouse=True)
def nothing_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(ranks: int, arguments: list[str]) -> int:
        raise AssertionError("ranks were launched")

    monkeypatch.setattr(distmerge.launch.ranks, "launch", launch)


def error_of(outcome: Outcome) -> str:
    assert outcome.status == 2, outcome
    assert outcome.stdout == ""
    assert outcome.stderr.startswith("error: ")
    assert outcome.stderr.count("\n") == 1
    return outcome.stderr.removeprefix("error: ").strip()


# ---- before a rank is launched


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: VERB; see distmerge --help"),
        (
            "trane",
            "argument VERB: invalid choice: 'trane' (choose from "
            + ", ".join(f"'{verb}'" for verb in VERBS)
            + "); see distmerge --help",
        ),
        ("train", "distmerge train needs a CONFIG.toml, such as configs/quickstart.toml"),
        ("train --steps 3", "cannot read the configuration 3: No such file or directory"),
        ("train nowhere.toml", "cannot read the configuration nowhere.toml: No such file or directory"),
        ("train {0}", "cannot read the configuration {0}: Is a directory"),
        (
            "train {0}/text.txt",
            "{0}/text.txt is not valid TOML: Expected '=' after a key in a key/value pair (at line 1, column 7)",
        ),
        ("train {0}/broken.toml", "{0}/broken.toml is not valid TOML: Invalid value (at line 1, column 9)"),
        ("train {0}/config.toml --ranks x", "argument --ranks: invalid int value: 'x'; see distmerge train --help"),
        ("train {0}/config.toml --ranks 3", "--ranks must be a multiple of config.mesh.workers = 2, got 3"),
        ("train {0}/config.toml --ranks 0", "--ranks must be a multiple of config.mesh.workers = 2, got 0"),
        ("train {0}/config.toml stray", "expected --section.key value, got stray"),
        ("train {0}/config.toml --run-dir", "--run_dir needs a value"),
        ("train {0}/config.toml --step 3", 'config.step is not a known key; did you mean "steps"?'),
        ("train {0}/config.toml --verbose", 'config.verbose is not a known key; did you mean "merge"?'),
        ("train {0}/config.toml --steps many", "config.steps must be an integer, got 'many'"),
        ("train {0}/config.toml --run-dir=", "config.run_dir must be a string that is not empty, got ''"),
        ("train {0}/config.toml --steps 0", "config.steps must be >= 1, got 0"),
        ("train {0}/config.toml --data.files {0}/no*.txt", 'config.data.files: "{0}/no*.txt" matches no file'),
        (
            "train {0}/config.toml --data.files {0}/table.csv",
            "config.data.files must be all text (.txt, .py, .md, .rst, .c, .h), all .jsonl or all .parquet, got .csv",
        ),
        (
            "train {0}/config.toml --data.files {0}/text.txt {0}/rows.jsonl",
            "config.data.files must be all text (.txt, .py, .md, .rst, .c, .h), all .jsonl or all .parquet, got .jsonl, .txt",
        ),
        (
            "train {0}/config.toml --data.tokenizer {0}/nowhere",
            "config.data.tokenizer must be a directory or a hub id, got {0}/nowhere, which does not exist",
        ),
        (
            "train {0}/config.toml --model.path {0}/nowhere",
            "config.model.path must be given exactly when config is not, got both",
        ),
        (
            "train {0}/config.toml --run-dir /proc/run",
            "config.run_dir must be writable, got /proc/run: No such file or directory",
        ),
        ("train {0}/config.toml --run-dir {0}/text.txt", "config.run_dir must be writable, got {0}/text.txt: File exists"),
        ("eval", "the following arguments are required: MODEL_DIR; see distmerge eval --help"),
        ("eval {0}/nowhere", "MODEL_DIR must be a directory, got {0}/nowhere"),
        ("eval {0} --sequences 0", "--sequences must be >= 1, got 0"),
        ("eval {0} --sequence-length 1", "--sequence-length must be >= 2, got 1"),
        ("eval {0} --file a.txt", "unknown argument --file; distmerge eval --help lists them"),
    ],
)
def test_mistakes(folder: Path, arguments: str, message: str) -> None:
    said = error_of(command(arguments.format(folder).split()))
    assert said == message.format(folder)


def test_a_model_directory_that_is_missing(folder: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'run_dir = "{tmp_path}/run"\n[model]\npath = "{tmp_path}/nowhere"\n')
    expected = f"config.model.path must be a directory or a hub id, got {tmp_path}/nowhere, which does not exist"
    assert error_of(command(["train", str(config)])) == expected


def test_the_run_directory_of_another_configuration(folder: Path, tmp_path: Path) -> None:
    from distmerge.config import toml

    stored = toml.read(str(folder / "config.toml"), ["--run-dir", str(tmp_path), "--optimizer.lr", "0.5"])
    RunDirectory(tmp_path).begin(stored, [])
    said = error_of(command(["train", str(folder / "config.toml"), "--run-dir", str(tmp_path), "--merge.0.every", "3"]))
    assert said == (
        f"config.run_dir {tmp_path} belongs to a run of another configuration; differing keys: merge.0.every, optimizer.lr; "
        "take another --run-dir, start from scratch with --restart, or only change plugins, steps, mesh.timeout_seconds, "
        "mesh.watchdog_seconds, train.threads, log, evaluate, checkpoint, preview, recovery, "
        "engine.kind, engine.reshard_after_forward, train.batch_size, train.gradient_accumulation"
    )


HOLD = """
import sys, time
from distmerge.rundir.layout import Lock, RunDirectory
run = RunDirectory(sys.argv[1])
lock = Lock(run)
lock.take_job()
lock.join(0)
print("held", flush=True)
time.sleep(1000)
"""


def test_a_run_directory_in_use_says_by_whom(folder: Path, tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        said = error_of(command(["train", str(folder / "config.toml"), "--run-dir", str(tmp_path)]))
        assert said.startswith(f"config.run_dir {tmp_path} is in use by process {holder.pid} on {os.uname().nodename} since ")
    finally:
        holder.kill()
        holder.wait()
    lock = Lock(RunDirectory(tmp_path))
    lock.take_job(patience_seconds=0)  # the dead hold nothing, though their name is still in the file
    lock.release()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_directory_without_permission(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    said = error_of(command(["train", str(folder / "config.toml"), "--run-dir", str(tmp_path / "closed" / "run")]))
    assert said == f"config.run_dir must be writable, got {tmp_path}/closed/run: Permission denied"


# ---- in the ranks: told once, though all of them fail


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--train.batch-size 100000",
            "config.data must hold at least one batch, 800000 sequences (2 ranks x 4 micro steps x 100000), got ",
        ),
        (
            "--data.files {0}/short.txt",
            "config.data must hold at least 2 pieces of text, one of them held out, got 1",
        ),
        ("--data.files {0}/null.jsonl", 'config.data.column must hold text in every row, got none in a row of "text"'),
        ("--data.files {0}/numbers.jsonl", 'config.data.column must hold text, got int64 in "text"'),
        ("--data.files {0}/other.jsonl", 'config.data.column must be one of body, got "text"'),
        ("--data.files {0}/rows.jsonl --data.column words", 'config.data.column must be one of text, got "words"'),
        ("--data.files {0}/cut.jsonl", "config.data: cannot read {0}/cut.jsonl: JSON parse error: Invalid value. in row 1"),
        ("--data.files {0}/empty.jsonl", "config.data: cannot read {0}/empty.jsonl: it has no rows"),
        ("--data.files {0}/bad.parquet", "config.data: cannot read {0}/bad.parquet: Parquet magic bytes not found in footer"),
        (
            "--data.sequence-length 3000",
            "config.data.sequence_length must be <= 2048, the model's number of positions, got 3000",
        ),
        (
            "--data.eval-fraction 0.001 --data.files {0}/rows.jsonl --data.sequence-length 2000",
            "config.data.eval_fraction must hold out ",
        ),
        (
            "--data.tokenizer nobody/nothing",
            "config.data.tokenizer must be a directory or a hub id, got nobody/nothing, which does not exist here, and ",
        ),
        ("--model.config.model-type lama", 'config.model.config.model_type must be one that transformers knows, got "lama"'),
        (
            "--model.config.hiden-size 32",
            'config.model.config.hiden_size is not a known key of llama; did you mean "hidden_size"?',
        ),
        (
            "--model.config.hidden-size wide",
            "config.model.config is not valid for llama: TypeError: Field 'hidden_size' expected int, ",
        ),
        (
            "--model.config.num-attention-heads 3",
            "config.model.config is not valid for llama: ValueError: The hidden size (16) is not ",
        ),
        ("--model.config.hidden-act foo", "config.model.config does not describe a causal language model: unknown key 'foo'"),
        ("--model.config.vocab-size 100", "config.model.config.vocab_size must be >= 384, the tokenizer's, got 100"),
        (
            "--data.streaming true --data.files {0}/null.jsonl",
            "config.data.column must hold text in every row, got none in a row of ",
        ),
        ("--data.streaming true --data.files {0}/cut.jsonl", "config.data: cannot read {0}/cut.jsonl: JSON parse error: "),
        ("--data.streaming true --data.files {0}/other.jsonl", 'config.data.column must be one of body, got "text"'),
    ],
)
def test_mistakes_that_ranks_find(ranks: Ranks, folder: Path, tmp_path: Path, arguments: str, message: str) -> None:
    fixed = ["train", str(folder / "config.toml"), "--run-dir", str(tmp_path / "run"), "--steps", "2"]
    outcomes: list[Outcome] = ranks.run(2, command, [*fixed, *arguments.format(folder).split()], group=False)
    assert [outcome.status for outcome in outcomes] == [2, 2], outcomes
    said = "".join(outcome.stdout + outcome.stderr for outcome in outcomes)
    assert said.count("\n") == 1, said
    assert said.startswith("error: " + message.format(folder)), said


def test_a_model_of_fewer_tokens_than_the_tokenizer(ranks: Ranks, folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2
    )
    LlamaForCausalLM(small).save_pretrained(tmp_path / "model")
    text = (folder / "config.toml").read_text()
    start, stop = text.index("[model.config]"), text.index("[data]")
    config = tmp_path / "config.toml"
    config.write_text(text[:start] + f'[model]\npath = "{tmp_path}/model"\n' + text[stop:])
    outcomes = ranks.run(2, command, ["train", str(config), "--run-dir", str(tmp_path / "run")], group=False)
    said = "".join(outcome.stderr for outcome in outcomes)
    assert said == "error: config.data.tokenizer must have at most 50 tokens, the size of the model's embedding, got 384\n"


# ---- as real processes


def test_a_mistake_that_a_rank_finds_is_one_line_of_the_command(folder: Path, tmp_path: Path) -> None:
    arguments = ["train", str(folder / "config.toml"), "--run-dir", str(tmp_path / "run"), "--train.batch-size", "100000"]
    job = jobs.distmerge(arguments, tmp_path / "log")
    assert job.wait() == 2
    assert job.output.startswith("error: config.data must hold at least one batch, 800000 sequences")
    assert job.output.count("\n") == 1


def test_a_mistake_is_one_line_of_the_process(tmp_path: Path) -> None:
    job = jobs.distmerge(["train", "nowhere.toml"], tmp_path / "log")
    assert job.wait() == 2
    assert job.output == "error: cannot read the configuration nowhere.toml: No such file or directory\n"


def test_help_lists_every_key(capsys: pytest.CaptureFixture) -> None:
    from distmerge.cli import main

    with pytest.raises(SystemExit) as leave:
        main.run(["train", "--help"])
    assert not leave.value.code
    text = capsys.readouterr().out
    for key in ("--mesh.workers", "--data.sequence-length", "--optimizer.lr", "--checkpoint.every", "--run-dir"):
        assert key in text
