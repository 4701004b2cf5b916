"""Malformed configurations and environments; how a case is made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.jobs import MODEL

RANK = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
PAIR = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
SLURM = {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "7"}
FREE = "free"
"""Stands for a port that nobody listens on."""
TAKEN = "taken"
"""Stands for a port that somebody listens on."""

CONFIG = """
run_dir = "{root}/run"
steps = 1
[mesh]
device = "cpu"
timeout_seconds = 1
{model}
[data]
source = "files"
files = ["{root}/text.txt"]
sequence_length = 16
[train]
batch_size = 1
threads = 1
"""
TWO = '\n[[merge]]\nkind = "diloco"\n'


class Case(NamedTuple):
    """Attributes: make, from the case's folder to the command's arguments; what the environment says beside; whether torch
    is needed for the answer."""

    make: Callable[[Path], list[str]]
    environment: dict[str, str] = {}  # noqa: RUF012
    heavy: bool = False


def config_in(root: Path, more: str = "") -> str:
    (root / "text.txt").write_text("".join(f"line {index} of a small text\n" for index in range(400)))
    (root / "config.toml").write_text(CONFIG.format(root=root, model=MODEL) + more)
    return str(root / "config.toml")


def train(*overrides: str, more: str = "", **environment: str) -> Case:
    """Overrides of a configuration that trains, or lines more in it."""
    return Case(lambda root: ["train", config_in(root, more), *(word.format(root=root) for word in overrides)], environment)


def in_rank(*overrides: str, more: str = "") -> Case:
    return Case(train(*overrides, more=more).make, RANK, heavy=True)


def whole(content: bytes) -> Case:
    """A configuration of these bytes."""

    def make(root: Path) -> list[str]:
        (root / "config.toml").write_bytes(content)
        return ["train", str(root / "config.toml")]

    return Case(make)


def merges(*kinds: str) -> str:
    """[[merge]] entries of two workers."""
    return "".join(f"\n[[merge]]\n{kind}\n" for kind in kinds)


def words(text: str, heavy: bool = False) -> Case:
    return Case(lambda root: [word.format(root=root) for word in text.split()], heavy=heavy)


def file(name: str, content: bytes | str, *overrides: str) -> Case:
    """A rank that reads this file as its data."""

    def make(root: Path) -> list[str]:
        config = config_in(root)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return ["train", config, "--data.files", str(root / name), *overrides]

    return Case(make, RANK, heavy=True)


def several(text: str) -> Case:
    def make(root: Path) -> list[str]:
        (root / "experts.toml").write_text(text.format(root=root))
        return ["experts", str(root / "experts.toml")]

    return Case(make)


def experiment(text: str) -> Case:
    def make(root: Path) -> list[str]:
        (root / "ptm.toml").write_text(text.format(root=root))
        return ["ptm", str(root / "ptm.toml")]

    return Case(make)


TWO_WORKERS = ("--mesh.workers", "2")

CONFIGURATION: dict[str, Case] = {
    "an empty file": whole(b""),
    "not TOML": whole(b"steps = = 3"),
    "bytes that are no UTF-8": whole(b'run_dir = "\xff\xfe"'),
    "UTF-16": whole('run_dir = "x"'.encode("utf-16")),
    "NUL bytes": whole(b"\0" * 64),
    "nested too deep": whole(b"a = " + b"[" * 100_000),
    "tables nested too deep": whole(b"a" + b".a" * 2_000 + b" = 1"),
    "a number of 10,000 digits": whole(b"seed = " + b"9" * 10_000),
    "a key twice": whole(b"steps = 3\nsteps = 4"),
    "two megabytes": whole(b"# " + b"x" * (2 << 20)),
    "only a run_dir": whole(b'run_dir = "run"'),
    "a list for a section": whole(b'run_dir = "run"\nmesh = [1]\n[model]\npath = "x"'),
    "a directory": Case(lambda root: ["train", str(root)]),
    "a device": words("train /dev/zero"),
    "no such file": words("train {root}/nowhere.toml"),
    "no file at all": words("train"),
    "a stray word": train("stray"),
    "an unknown key": train("--step", "3"),
    "an unknown section": train("--optimiser.lr", "1"),
    "a key into a value": train("--steps.more", "1"),
    "no value": train("--run-dir"),
    "two values": train("--steps", "1", "2"),
    "learning-rate": train("--optimizer.learning-rate", "1"),
    "merge.every": train("--merge.every", "3", more=TWO),
    "merge of a word": train("--merge.x.every", "3", more=TWO),
    "a merge too far": train("--merge.7.every", "3", more=TWO),
    "steps of a word": train("--steps", "many"),
    "no steps": train("--steps", "0"),
    "half a step": train("--steps", "0.5"),
    "a negative seed": train("--seed", "-1"),
    "a seed beyond 64 bits": train("--seed", str(1 << 64)),
    "a seed of 100 digits": train("--seed", "9" * 100),
    "a timeout of 1e300": train("--mesh.timeout-seconds", "1e300"),
    "a timeout of 1e-9": train("--mesh.timeout-seconds", "1e-9"),
    "a timeout of NaN": train("--mesh.timeout-seconds", "nan"),
    "a watchdog of 0": train("--mesh.watchdog-seconds", "0"),
    "a watchdog of infinity": train("--mesh.watchdog-seconds", "inf"),
    "no workers": train("--mesh.workers", "0"),
    "workers without a merge": train(*TWO_WORKERS),
    "a merge of one worker": train(more=TWO),
    "an unknown device": train("--mesh.device", "tpu"),
    "NUL in run_dir": whole(b'run_dir = "a\\u0000b"\n[model]\npath = "x"'),
    "NUL in a file": whole(b'run_dir = "run"\n[model]\npath = "x"\n[data]\nsource = "files"\nfiles = ["a\\u0000b"]'),
    "NUL in the tokenizer": whole(b'run_dir = "run"\n[model]\npath = "x"\n[data]\ntokenizer = "a\\u0000b"'),
    "a run_dir in /proc": train("--run-dir", "/proc/run"),
    "a run_dir that is a file": train("--run-dir", "{root}/text.txt"),
    "a run_dir below a file": train("--run-dir", "{root}/text.txt/run"),
    "a name too long for the disk": train("--run-dir", "{root}/" + "x" * 300),
    "ranks of a word": train("--ranks", "x"),
    "no ranks": train("--ranks", "0"),
    "ranks that workers do not divide": train("--ranks", "3", *TWO_WORKERS, more=TWO),
    "a model and a path": train("--model.path", "{root}"),
    "no model type": whole(b'run_dir = "run"\n[model.config]\nhidden_size = 8'),
    "a negative rate": train("--optimizer.lr", "-1"),
    "an infinite rate": train("--optimizer.lr", "inf"),
    "one beta": train("--optimizer.betas", "0.9"),
    "a beta of 1": train("--optimizer.betas", "0.9", "1"),
    "an unknown optimizer": train("--optimizer.name", "sgd"),
    "an unknown schedule": train("--schedule.name", "step"),
    "warmup beyond the end": train("--schedule.warmup", "7"),
    "wsd without a decay": train("--schedule.name", "wsd"),
    "an unknown kind": train(*TWO_WORKERS, more=merges('kind = "dilico"')),
    "a merge without a kind": train(*TWO_WORKERS, more=merges("every = 3")),
    "two outer steps": train(*TWO_WORKERS, more=merges('kind = "diloco"', 'kind = "streaming-diloco"')),
    "none beside another": train(*TWO_WORKERS, more=merges('kind = "none"', 'kind = "sparta"')),
    "more fragments than steps": train(*TWO_WORKERS, more=merges('kind = "diloco"\nevery = 2\nfragments = 3')),
    "an overlap beyond the round": train(*TWO_WORKERS, more=merges('kind = "diloco"\nevery = 4\noverlap = 4')),
    "feedback without a loss": train(*TWO_WORKERS, more=merges('kind = "diloco"\nerror_feedback = true')),
    "a sharded outer state of a rule that is no sum": train(
        *TWO_WORKERS, more=merges('kind = "diloco"\nrule = "radial"\nouter_sharded = true')
    ),
    "a fraction of 0": train(*TWO_WORKERS, more=merges('kind = "sparta"\nfraction = 0')),
    "no files": train("--data.files", "{root}/no*.txt"),
    "files of an unknown suffix": train("--data.files", "{root}/config.toml"),
    "an unknown source": train("--data.source", "web"),
    "files without a source": train("--data.source", "stdlib"),
    "one token a sequence": train("--data.sequence-length", "1"),
    "everything held out": train("--data.eval-fraction", "1"),
    "a tokenizer that is not there": train("--data.tokenizer", "{root}/nowhere"),
    "completion as a stream": train("--data.format", "completion", "--data.streaming", "true"),
    "a batch of 0": train("--train.batch-size", "0"),
    "an unknown precision": train("--train.precision", "fp8"),
    "an engine's file that is not there": train("--engine.kind", "deepspeed", "--engine.config", "{root}/no.json"),
    "an engine's file that is no JSON": train("--engine.kind", "deepspeed", "--engine.config", "{root}/text.txt"),
    "an engine's table without the engine": train("--engine.config.bf16", "true"),
    "a window without a length": train(more="\n[window]\n"),
    "a window of two lengths": train(more="\n[window]\nevery = 3\nevery_tokens = 3\n"),
    "a preview without a window": train(more="\n[preview]\n"),
    "a window with a cosine": train("--schedule.name", "cosine", more="\n[window]\nevery = 1\n"),
    "an expert from nothing": train(more='\n[expert]\nskill = "x"\n'),
    "stopping by a merge without an expert": train(more='\n[stopping]\nrule = "merged"\n'),
    "experts: none": several('run_dir = "{root}/runs"\n'),
    "experts: no skill": several('run_dir = "{root}/runs"\n[model]\npath = "x"\n[[experts]]\nranks = 1\n'),
    "experts: ranks of a word": several('run_dir = "{root}/runs"\n[[experts]]\nskill = "a"\nranks = "x"\n'),
    "experts: a skill twice": several('run_dir = "{root}/r"\n[[experts]]\nskill = "a"\n[[experts]]\nskill = "a"\n'),
    "experts: an unknown mode": several('mode = "twice"\nrun_dir = "{root}/r"\n[[experts]]\nskill = "a"\n'),
    "experts: no run_dir": several('[[experts]]\nskill = "a"\n'),
    "experts: a run_dir of a number": several('run_dir = 7\n[[experts]]\nskill = "a"\n'),
    "experts: a table for a list": several('run_dir = "{root}/r"\nexperts = 3\n'),
    "ptm: empty": experiment(""),
    "ptm: an unknown key": experiment('out = "{root}/ptm"\nseed = 3\n[model.config]\nmodel_type = "llama"\n'),
    "ptm: seeds of words": experiment('out = "{root}/ptm"\nseeds = ["a"]\n[model.config]\nmodel_type = "llama"\n'),
}

ENVIRONMENT: dict[str, Case] = {
    "RANK of a word": train(**RANK | {"RANK": "x"}),
    "RANK empty": train(**RANK | {"RANK": ""}),
    "RANK negative": train(**RANK | {"RANK": "-1"}),
    "RANK beyond the world": train(**RANK | {"RANK": "1"}),
    "RANK of a fraction": train(**RANK | {"RANK": "0.5"}),
    "RANK without WORLD_SIZE": train(RANK="0"),
    "WORLD_SIZE without RANK": train(WORLD_SIZE="2"),
    "WORLD_SIZE of a word": train(**RANK | {"WORLD_SIZE": "two"}),
    "WORLD_SIZE 0": train(**RANK | {"WORLD_SIZE": "0"}),
    "WORLD_SIZE of 30 digits": train(**RANK | {"WORLD_SIZE": "9" * 30}),
    "LOCAL_RANK of a word": train(**RANK | {"LOCAL_RANK": "gpu"}),
    "LOCAL_RANK beyond the machine": train(**RANK | {"LOCAL_RANK": "3"}),
    "LOCAL_WORLD_SIZE of a word": train(**RANK | {"LOCAL_WORLD_SIZE": "x"}),
    "LOCAL_WORLD_SIZE beyond the world": train(**RANK | {"LOCAL_WORLD_SIZE": "2"}),
    "srun without scontrol": train(**SLURM | {"PATH": "/nowhere", "SLURM_STEP_NODELIST": "n[1-2]"}),
    "srun with a rank of a word": train(**SLURM | {"SLURM_PROCID": "x"}),
    "srun without a local rank": train(**{key: value for key, value in SLURM.items() if key != "SLURM_LOCALID"}),
    "srun with tasks of a word": train(**SLURM | {"SLURM_NTASKS": "many"}),
    "experts in turn under a launcher": several('run_dir = "{root}/r"\n[[experts]]\nskill = "a"\n')._replace(environment=RANK),
    **{
        name: Case(train(*TWO_WORKERS, more=TWO).make, PAIR | more, heavy=True)
        for name, more in {
            "MASTER_PORT of a word": {"MASTER_PORT": "x"},
            "MASTER_PORT of 0": {"MASTER_PORT": "0"},
            "MASTER_PORT beyond 65535": {"MASTER_PORT": "70000"},
            "no MASTER_PORT": {},
            "MASTER_ADDR empty": {"MASTER_ADDR": "", "MASTER_PORT": FREE},
            "MASTER_ADDR of two words": {"MASTER_ADDR": "two words", "MASTER_PORT": FREE},
            "MASTER_ADDR that is not ours": {"MASTER_ADDR": "nobody.invalid", "MASTER_PORT": FREE},
            "a host that never comes": {"RANK": "1", "LOCAL_RANK": "1", "MASTER_PORT": FREE},
            "a peer that never comes": {"MASTER_PORT": FREE},
            "a port in use": {"MASTER_PORT": TAKEN},
            "a world that workers do not divide": {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_PORT": FREE},
        }.items()
    },
}
