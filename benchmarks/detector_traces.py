"""Real runs for the detector's benchmark: small models, whose loss and gradient norm of every step are kept.

Clean runs vary the batch size (1 to 64), the learning rate, the number of workers and how texts are mixed; sick ones are the
same with a fault from step ``FAULT_AT`` on. The texts come with Python: its library's code, the prose of its manual,
C headers and decimal numbers. ``record`` trains all of them, some 20 minutes on two cores, with the real trainer, in which only
the batches are replaced. The traces are kept in git, so that judging the detector is quick and the same everywhere.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import socket
import sys
import sysconfig
import tempfile
from pathlib import Path
from pydoc_data import topics
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from distmerge.config import toml
from distmerge.engine.engine import StepResult
from distmerge.engine.torch import TorchEngine
from distmerge.launch.ranks import Place
from distmerge.trainer.loop import train

STEPS = 1000

SICK_STEPS = 520

FAULT_AT = 400
"""The first step of a fault, counted from 0."""

ROW = 64

BYTE_OFFSET = 3
"""The id of byte 0."""


class Run(NamedTuple):
    """A run: how its texts are mixed, its batch size, learning rate, workers and seed, and its fault ("" for none)."""

    mixture: str
    batch: int
    lr: float
    workers: int
    seed: int
    fault: str = ""

    @property
    def name(self) -> str:
        return f"{self.fault or 'clean'}-{self.mixture}-{self.batch}-{self.lr:g}-{self.workers}-{self.seed}"


MIXTURES = (
    "prose",
    "code",
    "headers",
    "digits",
    "rows",
    "rare",
    "rarer",
    "switch",
    "switches",
    "gradual",
    "in-order",
    "epochs",
)


def clean_runs(seed: int) -> list[Run]:
    """36 runs: each mixture thrice, over batch sizes and rates in turn; three of them of two workers."""
    sizes, rates = (1, 2, 4, 8, 16, 32, 64), (1e-3, 4e-3, 1e-2, 2e-2)
    runs = []
    for index in range(3 * len(MIXTURES)):
        workers = 2 if index in (3, 15, 27) else 1
        batch = sizes[(index + index // 12) % len(sizes)]
        rate = rates[(index + index // 4) % len(rates)] if batch > 1 else rates[index % 2]
        runs.append(Run(MIXTURES[index % len(MIXTURES)], batch, rate, workers, seed + index))
    return runs


FAULTS = ("rate x10 for 10", "rate x30", "random for 3", "random for good", "constant for 30", "rate ramp")


def sick_runs(seed: int) -> list[Run]:
    """18 runs: each fault at three batch sizes."""
    return [
        Run(mixture, batch, 4e-3, 1, seed + 100 + index * len(FAULTS) + number, fault)
        for index, (mixture, batch) in enumerate([("prose", 8), ("rows", 16), ("code", 32)])
        for number, fault in enumerate(FAULTS)
    ]


class Texts:
    """Bytes of each domain, and batches of them."""

    def __init__(self) -> None:
        library = Path(sysconfig.get_paths()["stdlib"])
        numbers = np.random.default_rng(0).integers(0, 10**6, 40_000)
        texts = {
            "prose": " ".join(topics.topics[name] for name in sorted(topics.topics)),
            "code": "\n".join(path.read_text() for path in sorted(library.glob("[a-m]*.py"))),
            "headers": "\n".join(path.read_text() for path in sorted(Path(sysconfig.get_paths()["include"]).glob("*.h"))),
            "digits": " ".join(str(number) for number in numbers),
        }
        self.bytes = {name: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) for name, text in texts.items()}

    def windows(self, domain: str, starts: Tensor, row: int) -> Tensor:
        text = self.bytes[domain]
        return text[(starts[:, None] + torch.arange(row)) % len(text)].long() + BYTE_OFFSET

    def batch(self, mixture: str, step: int, shape: torch.Size, random: torch.Generator) -> Tensor:
        """Token ids like ``shape``, [..., row], as ``mixture`` has them at ``step``."""
        row, rows = shape[-1], shape[:-1].numel()
        chance = torch.rand(rows, generator=random)
        starts = torch.randint(1 << 30, (rows,), generator=random)
        one = chance[0].item()
        domains = {
            "rare": "headers" if one < 0.1 else "prose",
            "rarer": "digits" if one < 0.02 else "code",
            "switch": "prose" if step < 500 else "code",
            "switches": "code" if step < 350 else "prose" if step < 700 else "headers",
        }
        if mixture == "in-order":  # neighbours in the text follow each other: correlated losses
            starts = (step * rows + torch.arange(rows)) * row
            return self.windows("code", starts, row).view(shape)
        if mixture == "epochs":  # 96 KB, again and again in the same order
            starts = (step * rows + torch.arange(rows)) * row % 98_304
            return self.windows("prose", starts, row).view(shape)
        if mixture == "rows":
            picks = (chance * len(self.bytes)).long()
        elif mixture == "gradual":
            picks = (chance < (step - 400) / 200).long()
        else:
            return self.windows(domains.get(mixture, mixture), starts, row).view(shape)
        return torch.stack(
            [self.windows(list(self.bytes)[pick], starts[i : i + 1], row)[0] for i, pick in enumerate(picks.tolist())]
        ).view(shape)


read_texts = functools.cache(Texts)


def table(run: Run, directory: Path) -> dict[str, Any]:
    model = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    text = directory / "text.txt"
    text.write_text("only its shape is used\n" * 4000)
    return {
        "run_dir": str(directory / run.name),
        "seed": run.seed,
        "steps": SICK_STEPS if run.fault else STEPS,
        "mesh": {"device": "cpu", "workers": run.workers},
        "model": {"config": model},
        "data": {"source": "files", "files": [str(text)], "sequence_length": ROW, "eval_fraction": 0.2},
        "train": {"batch_size": run.batch, "threads": 1},
        "optimizer": {"lr": run.lr},
        "schedule": {"warmup": 20},
        "merge": [{"kind": "average", "every": 20}] if run.workers > 1 else [],
        "evaluate": {"every": 10**6, "sequences": 8},
        "checkpoint": {"every": 10**6},
        "log": {"every": 100},
    }


def trace(run: Run, place: Place, directory: Path, port: int = 0) -> np.ndarray:
    """Train ``run`` in this process; float32 [2, steps], losses and gradient norms of this worker."""
    texts, real = read_texts(), TorchEngine.train_step
    random = torch.Generator().manual_seed(1000 * run.seed + place.rank)
    kept: list[list[float]] = []

    def train_step(self: TorchEngine, batch: Tensor, lr: float) -> StepResult:
        step = len(kept)
        batch = texts.batch(run.mixture, step, batch.shape, random)
        past = step - FAULT_AT if run.fault else -1
        if run.fault == "rate x10 for 10" and 0 <= past < 10:
            lr *= 10
        elif run.fault == "rate x30" and past >= 0:
            lr *= 30
        elif run.fault == "rate ramp" and past >= 0:
            lr *= 1.1**past
        elif (run.fault == "random for 3" and 0 <= past < 3) or (run.fault == "random for good" and past >= 0):
            batch = torch.randint(BYTE_OFFSET, BYTE_OFFSET + 256, batch.shape, generator=random)
        elif run.fault == "constant for 30" and 0 <= past < 30:
            batch = torch.full_like(batch, BYTE_OFFSET + 97)
        result = real(self, batch, lr)
        kept.append([float(result.loss), float(result.grad_norm)])
        return result

    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(place.rank), "WORLD_SIZE": str(place.world)}
    os.environ.update(where)
    TorchEngine.train_step = train_step
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            train(toml.validate(table(run, directory)), place, ["benchmark"])
    finally:
        TorchEngine.train_step = real
    return np.array(kept, dtype=np.float32).T


def one_of(rank: int, run: Run, directory: Path, port: int) -> None:
    """A rank of a run of several workers."""
    place = Place(rank, run.workers, rank, run.workers)
    folder = directory / f"of-{rank}"  # the text that the configuration names; the run's directory is shared
    folder.mkdir(exist_ok=True)
    np.save(folder / "trace.npy", trace(run, place, directory, port))


def traces(run: Run) -> list[np.ndarray]:
    """One trace for each worker."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if run.workers == 1:
            return [trace(run, Place(0, 1, 0, 1), directory)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.spawn(one_of, (run, directory, port), nprocs=run.workers)  # pyright: ignore
        return [np.load(directory / f"of-{rank}" / "trace.npy") for rank in range(run.workers)]


def record(path: Path, parts: Path, runs: list[Run]) -> None:
    """Train all runs and keep their traces in ``path``; those that an earlier start left in ``parts`` are not trained again."""
    parts.mkdir(parents=True, exist_ok=True)
    kept: dict[str, np.ndarray] = {}
    for run in runs:
        names = [f"{run.name}.{worker}" for worker in range(run.workers)]
        if not all((parts / f"{name}.npy").exists() for name in names):
            for name, made in zip(names, traces(run), strict=True):
                np.save(parts / f"{name}.npy", made)
            print(run.name, file=sys.stderr, flush=True)
        kept |= {name: np.load(parts / f"{name}.npy") for name in names}
    np.savez_compressed(path, **kept)  # pyright: ignore[reportArgumentType]


def recorded(path: Path) -> dict[str, np.ndarray]:
    """Traces by name, each [2, steps]."""
    with np.load(path) as file:
        return {name: file[name] for name in file.files}
