"""The share of the annealing gain that merging a constant-rate run's window recovers, and how well it predicts annealing.

One constant-rate run per seed, on the standard library's source text. Forks of it are truly annealed (linear, 1-sqrt) over
the last L steps, on the same batches; the window merges the blocks of the same L steps. For each curve and length

    share = (constant - merged) / (constant - annealed)

on held-out text. The best length, and what is merged in which way, are chosen on seeds of their own. The forks of those seeds
correct the prediction of the judged ones (distmerge.windows.prediction), as ``distmerge anneal --calibrate`` does.

    python benchmarks/window.py [--small] [--seeds N] [--out DIR] [--record]

Finished seeds lie in OUT/window/seed-N.json and are not run again.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import Report, parser, remembered, spread
from torch import Tensor
from window_shares import ANNEALS, Size, advised, best_share, errors, shares, told

from distmerge.config import toml
from distmerge.config.checkpoints import WindowSettings
from distmerge.config.train import TrainConfig
from distmerge.data.packed import IndexedBatches, open_corpus, sampled
from distmerge.engine.torch import TorchEngine
from distmerge.evaluate import evaluate
from distmerge.launch.ranks import Place
from distmerge.mesh import Mesh
from distmerge.model import build_model, load_tokenizer
from distmerge.rules.decay import DECAYS
from distmerge.windows.advice import gram_of
from distmerge.windows.window import Window

CURVES = ("linear", "1-sqrt", "cosine", "wma")
CHOOSING_SEEDS = (100, 101, 10, 11, 12)
FIRST_JUDGED = 20  # no seed that was looked at when the prediction was designed
EVAL_SEQUENCES = 256


FULL = Size(steps=900, every=10, lengths=(50, 100, 200, 300), early=600, early_lengths=(100, 200))
SMALL = Size(steps=150, every=10, lengths=(50,), early=100, early_lengths=(50,))


def configuration(seed: int) -> TrainConfig:
    model = {
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    table = {
        "run_dir": "unused",
        "seed": seed,
        "model": {"config": model},
        "train": {"batch_size": 8},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup": 50},
    }
    return toml.validate(table)


class Bench:
    """One seed's run: its engine, its data, its two windows."""

    def __init__(self, seed: int, size: Size, mesh: Mesh):
        self.config, self.size, self.mesh = configuration(seed), size, mesh
        tokenizer = load_tokenizer("bytes")
        self.engine = TorchEngine(build_model(self.config.model, tokenizer, seed), self.config, mesh)
        corpus = open_corpus(self.config.data)
        self.batches = IndexedBatches(corpus.train, seed, 0, 1, 1, self.config.train.batch_size)
        self.held_out = sampled(corpus.held_out, EVAL_SEQUENCES)
        tokens = self.config.train.batch_size * self.config.data.sequence_length
        self.losses: dict[int, float] = {}
        self.windows = {}
        for kind in ("mean", "snapshot"):
            section = WindowSettings(every=size.every, blocks=0, kind=kind, store="memory")
            flat = self.engine.parameters
            self.windows[kind] = Window(section, Path("unused"), flat, [], mesh, tokens, tokenizer, lambda *told: None)

    def constant(self) -> dict[tuple[int, int], Any]:
        """Train at a constant rate; the states from which forks are annealed, by where they end and their length."""
        states, size, warmup = {}, self.size, self.config.schedule.warmup
        for step in range(size.steps):
            for end, lengths in ((size.early, size.early_lengths), (size.steps, size.lengths)):
                if end - step in lengths:
                    states[end, end - step] = self.state()
            lr = self.config.optimizer.lr * min(1.0, (step + 1) / warmup)
            result = self.engine.train_step(self.batches.batch(step), lr)
            for window in self.windows.values():
                window.observe(step + 1, lr, result.loss)
            if step + 1 in (size.early, size.steps):
                self.losses[step + 1] = self.loss()
        return states

    def state(self) -> Any:
        optimizers = [copy.deepcopy(optimizer.state_dict()) for optimizer in self.engine.optimizers]
        return self.engine.parameters.whole.clone(), optimizers

    def anneal(self, state: Any, end: int, length: int, curve: str) -> float:
        """The loss after the ``length`` steps before ``end`` with a decay in place of the constant rate."""
        theta, optimizers = state
        self.engine.parameters.whole.copy_(theta)
        for optimizer, saved in zip(self.engine.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(saved))
        for index in range(length):
            lr = self.config.optimizer.lr * DECAYS[curve]((index + 1) / length)
            self.engine.train_step(self.batches.batch(end - length + index), lr)
        return self.loss()

    def loss(self) -> float:
        return evaluate(self.engine.model, self.held_out, self.config.train.batch_size).loss

    def merged(self, kind: str, end: int, length: int, curve: str) -> float:
        """The loss of the merge of the blocks of the ``length`` steps before ``end``."""
        window = self.windows[kind]
        blocks = [block for block in window.mergeable() if end - length < block.last_step <= end]
        with self.engine.parameters.borrowed():
            window.merge_into(self.engine.parameters, curve, blocks)
            return self.loss()

    def grams(self) -> dict[str, Any]:
        """Inner products of the block means' distances over the longest window: as they are, and with Adam's second
        moments as the curvature's diagonal."""
        blocks = self.windows["mean"].mergeable(max(self.size.lengths) // self.size.every)
        vectors: list[Tensor] = self.windows["mean"].kept[-len(blocks) :]
        flat = self.engine.parameters
        moments = {id(p): state["exp_avg_sq"] for p, state in self.engine.optimizers[0].state.items()}
        named = dict(flat.model.named_parameters())
        curvature = torch.cat([moments[id(named[slot.name])].reshape(-1) for slot in flat.layout])
        return {
            "starts": [float(block.first_token) for block in blocks],
            "end": float(blocks[-1].last_token),
            "plain": gram_of(vectors).tolist(),
            "curved": gram_of([vector * curvature.sqrt() for vector in vectors]).tolist(),
        }


def measure(seed: int, size: Size, out: Path) -> dict[str, Any]:
    """All losses of one seed, on one thread: seeds run side by side."""
    key = {"seed": seed, "size": list(size), "configuration": configuration(seed).model_dump(mode="json")}
    return remembered(out / f"seed-{seed}.json", key, lambda: run(seed, size))


def run(seed: int, size: Size) -> dict[str, Any]:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    mesh = Mesh(configuration(seed).mesh, Place(0, 1, 0, 1), threads=1)
    bench = Bench(seed, size, mesh)
    states = bench.constant()
    found: dict[str, Any] = {"seed": seed, "grams": bench.grams()}
    found["constant"], found["early_constant"] = bench.losses[size.steps], bench.losses[size.early]
    found["merged"] = {
        f"{kind} {curve} {length}": bench.merged(kind, size.steps, length, curve)
        for kind in bench.windows
        for curve in CURVES
        for length in size.lengths
    }
    found["early_merged"] = {
        f"mean {curve} {length}": bench.merged("mean", size.early, length, curve)
        for curve in ("linear", "wma")
        for length in size.early_lengths
    }
    found["early_annealed"], found["annealed"] = {}, {}
    for (end, length), state in states.items():
        for curve in ANNEALS if end == size.steps else ("linear",):
            place = found["annealed" if end == size.steps else "early_annealed"]
            place[f"{curve} {length}"] = bench.anneal(state, end, length, curve)
    mesh.close()
    return found


def main() -> None:
    options = parser(__doc__, seeds=3).parse_args()
    report = Report("window", options)
    size = SMALL if options.small else FULL
    report.data |= {"size": size._asdict(), "optimizer": configuration(0).optimizer.model_dump(mode="json")}
    judged = range(FIRST_JUDGED, FIRST_JUDGED + (1 if options.small else options.seeds))
    seeds = [*(CHOOSING_SEEDS[:1] if options.small else CHOOSING_SEEDS), *judged]
    open_corpus(configuration(0).data)  # fills the cache once
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(measure, seeds, [size] * len(seeds), [report.out] * len(seeds)))
    choosing, judged = results[: -len(judged)], results[-len(judged) :]
    means = [name for name in judged[0]["merged"] if name.startswith("mean")]
    best = max(means, key=lambda name: sum(result["constant"] - result["merged"][name] for result in choosing))
    report.say(f"chosen on seeds {[result['seed'] for result in choosing]}: {best}")
    report.data |= {"chosen": best, "choosing": [*map(told, choosing)], "judged": [*map(told, judged)]}
    report.data["share"] = {name: spread([shares(result, name) for result in judged]) for name in judged[0]["merged"]}
    for name, found in report.data["share"].items():
        report.say(f"{name:<24} recovers {found['median']:.0%} ({found['low']:.0%} to {found['high']:.0%})")
    share = float(np.mean([shares(result, best) for result in judged]))
    report.bar("block means recover this share of the annealing gain at the best length", share, ">=", 0.8, quality=True)
    wrong = errors(judged, choosing, size)
    for kind, by_length in wrong.items():
        report.say(f"{kind} prediction of a linear decay: worst error " + ", ".join(
            f"{max(map(abs, values)):.2%} over {length}" for length, values in by_length.items()
        ))  # fmt: skip
    report.data["prediction_errors"] = wrong
    worst = max(abs(value) for value in wrong["corrected"][int(best.split()[2])])
    claim = "the merge, corrected by forks of other seeds, predicts the loss of a linear decay of that length to within"
    report.bar(claim, worst, "<=", 0.01, quality=True)
    for metric in ("plain", "curved"):
        regret = [best_share(result) - shares(result, advised(result, metric, size.every)) for result in judged]
        report.data[f"advice_regret_{metric}"] = regret
        said = [advised(result, metric, size.every) for result in judged]
        report.say(f"the gate, distances {metric}, advised {said}: {statistics.mean(regret):.2f} of share lost to the best")
    report.finish()


if __name__ == "__main__":
    main()
