"""Malformed data, flags and models."""

from __future__ import annotations

import gzip
from pathlib import Path

from tests.experts import malformed as models
from tests.faults.malformed_config import Case, config_in, file, in_rank, train, words

DATA: dict[str, Case] = {
    "one piece of text": file("short.txt", "a b c\n" * 40),
    "an empty text": file("empty.txt", ""),
    "no rows": file("empty.jsonl", ""),
    "a row without text": file("null.jsonl", '{"text": "a"}\n{"text": null}\n'),
    "numbers for text": file("numbers.jsonl", '{"text": 1}\n{"text": 2}\n'),
    "another column": file("other.jsonl", '{"body": "a"}\n{"body": "b"}\n'),
    "cut JSON": file("cut.jsonl", '{"text": "a"}\n{"text": \n'),
    "a list a row": file("lists.jsonl", "[1]\n[2]\n"),
    "no parquet": file("bad.parquet", "no parquet"),
    "too few sequences": file("few.txt", "a few words\n" * 300, "--train.batch-size", "100000"),
    "completion without columns": file("text.jsonl", '{"text": "a"}\n' * 9, "--data.format", "completion"),
    "chat of numbers": file("chat.jsonl", '{"messages": 3}\n' * 9, "--data.format", "chat"),
    "a stream without text": file("null.jsonl", '{"text": "a"}\n{"text": null}\n', "--data.streaming", "true"),
    "a stream of cut JSON": file("cut.jsonl", '{"text": "a"}\n{"text": \n', "--data.streaming", "true"),
    "sequences beyond the model": in_rank("--data.sequence-length", "3000"),
    "an unknown model type": in_rank("--model.config.model-type", "lama"),
    "an unknown key of the model": in_rank("--model.config.hiden-size", "32"),
    "a hidden size of a word": in_rank("--model.config.hidden-size", "wide"),
    "heads that do not divide": in_rank("--model.config.num-attention-heads", "3"),
    "an unknown activation": in_rank("--model.config.hidden-act", "foo"),
    "a vocabulary of a word": in_rank("--model.config.vocab-size", "abc"),
    "a vocabulary of a list": in_rank("--model.config.vocab-size", "[400]"),
    "a vocabulary too small": in_rank("--model.config.vocab-size", "100"),
}

VERBS: dict[str, Case] = {
    "no verb": words(""),
    "an unknown verb": words("trane"),
    "eval: nothing": words("eval"),
    "eval: no directory": words("eval {root}/nowhere"),
    "eval: no batches": words("eval {root} --batches 0"),
    "eval: a batch of a word": words("eval {root} --batches x"),
    "eval: one token": words("eval {root} --sequence-length 1"),
    "eval: an unknown flag": words("eval {root} --file a.txt"),
    "eval: an empty directory": words("eval {root}", heavy=True),
    "merge: no output": words("merge --method linear --model a"),
    "merge: no recipe": words("merge --out {root}/out"),
    "merge: two recipes": words("merge {root}/a.yaml --method linear --model a --out {root}/out"),
    "merge: a recipe of no notation": words("merge {root}/a.json --out {root}/out"),
    "merge: no threads": words("merge --threads 0 --method linear --model a --out {root}/out"),
    "merge: verify and merge": words("merge --verify {root} --out {root}/out"),
    "merge: verify nothing": words("merge --verify {root}", heavy=True),
    "diagnose: one model": words("diagnose {root} --base {root}/base", heavy=True),
    "diagnose: a model twice": words("diagnose a a --base b", heavy=True),
    "diagnose: no batches": words("diagnose a b --base c --batches 0"),
    "diagnose: no base": words("diagnose a b"),
    "sweep: no method": words("sweep --grid lambda=1"),
    "sweep: no skill": words("sweep --method ties --model a --grid lambda=1", heavy=True),
    "examples: no run": words("examples {root}/nowhere --merged m", heavy=True),
    "examples: no merge": words("examples {root}"),
    "experts: no file": words("experts {root}/nowhere.toml"),
    "ptm: no file": words("ptm {root}/nowhere.toml"),
    "ptm: a skill without files": words("ptm {root}/nowhere.toml --skill =x"),
    "window: nothing to do": words("window {root}"),
    "window: last 0": words("window {root} --last 0 --explain"),
    "window: steps of words": words("window {root} --steps a:b --explain"),
    "window: a plot of no format": words("window {root} --plot picture"),
    "window: no run": words("window {root}/nowhere --explain", heavy=True),
    "window: an empty run": words("window {root} --explain", heavy=True),
    "anneal: no run": words("anneal {root} --from 3 --decay-steps 2", heavy=True),
    "anneal: no decay": words("anneal {root} --from 3 --decay-steps 0"),
    "anneal: no step": words("anneal {root} --decay-steps 3"),
    "recover: no run": words("recover {root}", heavy=True),
    "recover: batches from nowhere": words("recover {root} --skip-batches 3", heavy=True),
    "recover: merge none": words("recover {root} --merge-last 0"),
    "recover: an unknown optimizer": words("recover {root} --keep-optimizer lost"),
    "verify: no run": words("verify {root}/nowhere"),
    "verify: an empty run": words("verify {root}"),
}

MODELS: dict[str, Case] = {
    name: Case(lambda root, content=content: models.recipe(root, models.raw(root / "bad", content)))
    for name, content in models.HEADERS.items()
} | {name: Case(make) for name, make in models.OTHERS.items()}


def with_summary(content: str) -> Case:
    """A run directory whose summary is damaged."""

    def make(root: Path) -> list[str]:
        config = config_in(root)
        (root / "run" / "final").mkdir(parents=True)
        (root / "run" / "summary.json").write_text(content)
        return ["train", config]

    return Case(make)


RUNS: dict[str, Case] = {
    "a compressed text": file("text.txt", gzip.compress(b"words of a text\n" * 400)),
    "a text in UTF-16": file("text.txt", ("words of a text\n" * 400).encode("utf-16")),
    "a binary file": file("text.txt", bytes(range(256)) * 64),
    "a tokenizer's relative path": in_rank("--data.tokenizer", "models/nowhere"),
    "an empty run_dir": train("--run-dir", ""),
    "a summary that is no JSON": with_summary("{"),
    "a summary that is a list": with_summary("[]"),
    "a summary without steps": with_summary("{}"),
}
"""What a run is pointed at: its text, its tokenizer, its directory."""
