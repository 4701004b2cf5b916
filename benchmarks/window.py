"""The share of the annealing gain that merging a constant-rate run's window recovers.

One constant-rate run per seed, on the standard library's source text. Forks of it are truly annealed (linear, 1-sqrt) over
the last L steps, on the same batches; the window merges the blocks of the same L steps. For each curve and length

    share = (constant - merged) / (constant - annealed)

on held-out text. The best length, and what is merged in which way, are chosen on seeds of their own.

    python benchmarks/window.py [--small] [--seeds N] [--out DIR] [--record]
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from report import Report, parser, spread
from torch import Tensor

from distmerge import config_file
from distmerge.checkpoints.block import Block
from distmerge.checkpoints.curves import effective_count
from distmerge.checkpoints.gate import advise, gram_of
from distmerge.checkpoints.window import Window, block_weights
from distmerge.config import TrainConfig
from distmerge.config_checkpoints import Window as WindowSection
from distmerge.data import IndexedBatches, open_corpus
from distmerge.engine.torch import TorchEngine
from distmerge.evaluate import evaluate
from distmerge.launch import Place
from distmerge.mesh import Mesh
from distmerge.model import build_model, load_tokenizer
from distmerge.schedule import decayed

ANNEALS = ("linear", "1-sqrt")
CURVES = ("linear", "1-sqrt", "cosine", "wma")
CHOOSING_SEED = 100
EVAL_BATCHES = 24


class Size(NamedTuple):
    """Steps of the constant-rate run, its blocks, and the lengths of decays, in steps."""

    steps: int
    every: int
    lengths: tuple[int, ...]


FULL = Size(steps=900, every=10, lengths=(50, 100, 200, 300))
SMALL = Size(steps=150, every=10, lengths=(50, 100))


def configuration(seed: int) -> TrainConfig:
    model = {
        "model_type": "llama",
        "hidden_size": 80,
        "intermediate_size": 216,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    table = {
        "run_dir": "unused",
        "seed": seed,
        "model": {"config": model},
        "train": {"batch_size": 16},
        "optimizer": {"lr": 4e-3},
        "schedule": {"warmup": 50},
    }
    return config_file.validate(table)


class Bench:
    """One seed's run: its engine, its data, its two windows."""

    def __init__(self, seed: int, size: Size, mesh: Mesh):
        self.config, self.size, self.mesh = configuration(seed), size, mesh
        tokenizer = load_tokenizer("bytes")
        self.engine = TorchEngine(build_model(self.config.model, tokenizer, seed), self.config, mesh)
        corpus = open_corpus(self.config.data)
        self.batches = IndexedBatches(corpus.train, seed, 0, 1, 1, self.config.train.batch_size)
        self.held_out = corpus.held_out
        tokens = self.config.train.batch_size * self.config.data.sequence_length
        self.windows = {}
        for kind in ("mean", "snapshot"):
            section = WindowSection(every=size.every, blocks=0, kind=kind, store="memory")
            flat = self.engine.parameters
            self.windows[kind] = Window(section, Path("unused"), flat, [], mesh, tokens, tokenizer, lambda *told: None)

    def constant(self) -> dict[int, Any]:
        """Train at a constant rate; the states from which the forks are annealed, by length."""
        states = {}
        size, warmup = self.size, self.config.schedule.warmup
        for step in range(size.steps):
            if size.steps - step in size.lengths:
                states[size.steps - step] = self.state()
            lr = self.config.optimizer.lr * min(1.0, (step + 1) / warmup)
            result = self.engine.train_step(self.batches.batch(step), lr)
            for window in self.windows.values():
                window.observe(step + 1, lr, result.loss)
        return states

    def state(self) -> Any:
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.engine.optimizers]
        return self.engine.parameters.whole.clone(), optimizers

    def anneal(self, state: Any, length: int, curve: str) -> float:
        """The loss after the last ``length`` steps with a decay in place of the constant rate."""
        theta, optimizers = state
        self.engine.parameters.whole.copy_(theta)
        for optimizer, saved in zip(self.engine.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))
        for index in range(length):
            lr = self.config.optimizer.lr * decayed(curve, (index + 1) / length)
            self.engine.train_step(self.batches.batch(self.size.steps - length + index), lr)
        return self.loss()

    def loss(self) -> float:
        return evaluate(self.engine.model, self.held_out, self.config.train.batch_size, EVAL_BATCHES).loss

    def merged(self, kind: str, length: int, curve: str) -> tuple[float, float]:
        """The loss of the merge of the blocks of the last ``length`` steps, and its N_eff."""
        window = self.windows[kind]
        blocks: list[Block] = window.mergeable(length // self.size.every)
        with self.engine.parameters.borrowed():
            window.merge_into(self.engine.parameters, curve, blocks)
            return self.loss(), effective_count(block_weights(curve, blocks))

    def advice(self) -> dict[str, Any]:
        """What the gate says of the longest window of block means."""
        window = self.windows["mean"]
        count = max(self.size.lengths) // self.size.every
        vectors: list[Tensor] = window.kept[-count:]
        blocks = window.mergeable(count)
        found = advise(gram_of(vectors), [float(block.first_token) for block in blocks], float(blocks[-1].last_token))
        return {"curve": found.curve, "length": found.count * self.size.every, "ratio": found.ratio, "merge": found.merge}


def measure(seed: int, size: Size) -> dict[str, Any]:
    """All losses of one seed, on one thread: seeds run side by side."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    mesh = Mesh(configuration(seed).mesh, Place(0, 1, 0, 1), threads=1)
    bench = Bench(seed, size, mesh)
    states = bench.constant()
    found: dict[str, Any] = {"seed": seed, "constant": bench.loss(), "advice": bench.advice()}
    found["merged"] = {
        f"{kind} {curve} {length}": bench.merged(kind, length, curve)[0]
        for kind in bench.windows
        for curve in CURVES
        for length in size.lengths
    }
    found["annealed"] = {
        f"{curve} {length}": bench.anneal(states[length], length, curve) for curve in ANNEALS for length in size.lengths
    }
    mesh.close()
    return found


def shares(result: dict[str, Any], name: str) -> float:
    """Of one merge: the annealing gain recovered, against the better true decay of the same length."""
    length = name.split()[2]
    annealed = min(result["annealed"][f"{curve} {length}"] for curve in ANNEALS)
    return (result["constant"] - result["merged"][name]) / (result["constant"] - annealed)


def error(result: dict[str, Any], name: str) -> float:
    """Of one merge as a prediction of the better true decay of the same length: its relative error."""
    length = name.split()[2]
    annealed = min(result["annealed"][f"{curve} {length}"] for curve in ANNEALS)
    return abs(result["merged"][name] / annealed - 1)


def main() -> None:
    options = parser(__doc__, seeds=3).parse_args()
    report = Report("window", options)
    size = SMALL if options.small else FULL
    report.data |= {"size": size._asdict(), "optimizer": configuration(0).optimizer.model_dump(mode="json")}
    seeds = [CHOOSING_SEED, *range(1 if options.small else options.seeds)]
    open_corpus(configuration(0).data)  # fills the cache once
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        choosing, *judged = pool.map(measure, seeds, [size] * len(seeds))
    means = [name for name in choosing["merged"] if name.startswith("mean")]
    best = max(means, key=lambda name: choosing["constant"] - choosing["merged"][name])
    report.say(f"chosen on seed {CHOOSING_SEED}: {best}; constant {choosing['constant']:.4f}, {choosing['annealed']}")
    report.data |= {"chosen": best, "choosing": choosing, "judged": judged}
    report.data["share"] = {name: spread([shares(result, name) for result in judged]) for name in choosing["merged"]}
    report.data["error"] = {name: spread([error(result, name) for result in judged]) for name in choosing["merged"]}
    for name, found in report.data["share"].items():
        report.say(f"{name:<24} recovers {found['median']:.0%} ({found['low']:.0%} to {found['high']:.0%})")
    share = float(np.mean([shares(result, best) for result in judged]))
    report.bar("block means recover this share of the annealing gain at the best length", share, ">=", 0.8, quality=True)
    worst = max(error(result, best) for result in judged)
    report.bar("the merge predicts the annealed loss to within this share of it", worst, "<=", 0.01, quality=True)
    regret = [best_share(result) - shares(result, advised(result)) for result in judged]
    report.data["advice_regret"] = regret
    report.say(f"the gate advised {[result['advice'] for result in judged]}; share lost {statistics.mean(regret):.2f}")
    report.finish()


def advised(result: dict[str, Any]) -> str:
    """The merge nearest to the gate's advice among those that were measured."""
    advice = result["advice"]
    lengths = sorted({int(name.split()[2]) for name in result["merged"]})
    length = min(lengths, key=lambda measured: abs(measured - advice["length"]))
    return f"mean {advice['curve']} {length}"


def best_share(result: dict[str, Any]) -> float:
    return max(shares(result, name) for name in result["merged"] if name.startswith("mean"))


if __name__ == "__main__":
    main()
