"""What ``distmerge ptm`` measures on one seed's models: losses of merges and of other arms, on test texts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmerge.config.train import Data
from distmerge.data.packed import packed_text, sampled
from distmerge.evaluate import evaluate
from distmerge.experts.adapt import Theta
from distmerge.merging.in_memory import compare, diagnose, line, merge, read_model
from distmerge.merging.omegas import token_ratio, trained_tokens
from distmerge.model import load_model
from distmerge.studies.config import PtmConfig, Runs, Texts
from distmerge.studies.curves import SHORTER
from distmerge.theta.flat import FlatParameters

BATCH = 32


class Bench:
    """One model in memory, into which vectors are put to be judged."""

    def __init__(self, config: PtmConfig, texts: Texts, base: str):
        self.origin = base
        model = load_model(base)
        self.theta = Theta(model, FlatParameters(model))
        self.texts = {
            name: sampled(
                packed_text(
                    Data(source="files", files=[file], tokenizer=config.tokenizer, sequence_length=config.sequence_length)
                ),
                config.eval_sequences,
            )
            for name, file in texts.tests.items()
        }

    def vector(self, directory: str) -> Tensor:
        return self.theta.of(read_model(directory, self.origin))

    def losses(self, theta: Tensor, names: list[str] | None = None) -> dict[str, float]:
        """The loss on the named test texts, by default all; nats per token."""
        with self.theta.holding(theta):
            chosen = names or list(self.texts)
            return {name: evaluate(self.theta.model, self.texts[name], BATCH).loss for name in chosen}


def measure(config: PtmConfig, seed: int, texts: Texts, runs: Runs) -> dict[str, Any]:
    """All arms of a seed, as points with losses and costs; the merges of several skills; the merges for the method rule."""
    torch.manual_seed(seed)
    bench = Bench(config, texts, runs.base)
    base, general = bench.vector(runs.base), bench.vector(runs.general)
    experts = {name: bench.vector(path) for name, path in runs.experts.items()}
    points = [point("base", None, bench.losses(base), None), point("general", None, bench.losses(general), runs.general)]
    for name, expert in experts.items():
        finetuned = bench.vector(runs.finetuned[name])
        seen = ["general", name]
        points.append(point("expert", name, bench.losses(expert), runs.experts[name]))
        points.append(point("cft", name, bench.losses(finetuned), runs.finetuned[name]))
        for share, path in runs.shorter[name].items():
            points.append(point(f"{SHORTER}{share:g}", name, bench.losses(bench.vector(path), seen), path))
        for label, path in runs.replayed[name].items():
            points.append(point(f"cft+replay {label}", name, bench.losses(bench.vector(path)), path))
        points.append(point("rt", name, bench.losses(bench.vector(runs.retrained[name])), runs.retrained[name]))
        for omega in sorted({*config.omegas, omega_by_tokens(runs, name)}):
            arms = {
                "ptm": merge("ptm", base, [general, expert], omega),
                "linear": line(general, expert, omega),
                "wise-ft": line(general, finetuned, omega),
            }
            for arm, theta in arms.items():
                cost = runs.finetuned[name] if arm == "wise-ft" else runs.experts[name]
                points.append(point(arm, name, bench.losses(theta, seen), cost, omega))
    return {
        "points": points,
        "omega": {name: omega_by_tokens(runs, name) for name in experts},
        "several": several(bench, runs, base, general, experts),
        "rule": rule(bench, base, experts, seed),
    }


def point(arm: str, skill: str | None, losses: dict[str, float], run: str | None, omega: float | None = None) -> dict[str, Any]:
    """One measured model. ``tokens`` and ``steps`` are those that its arm trains beyond the base or the general model."""
    cost = json.loads((Path(run) / "training.json").read_text()) if run else {"tokens": 0, "steps": 0}
    found = {"arm": arm, "skill": skill, "losses": losses, "tokens": cost["tokens"], "steps": cost["steps"]}
    return found if omega is None else found | {"omega": omega}


def omega_by_tokens(runs: Runs, name: str) -> float:
    """|D| / |G|, at most 1."""
    d, g = (trained_tokens(Path(path), name) for path in (runs.experts[name], runs.general))
    return token_ratio(d, g)


def several(bench: Bench, runs: Runs, base: Tensor, general: Tensor, experts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Skills added to the general model one, two and three at a time, each by its own |D| / |G|. ``interference`` of a skill
    is by how much its loss is above that with this skill alone."""
    found: list[dict[str, Any]] = []
    alone: dict[str, float] = {}
    for count in (1, 2, 3):
        for names in itertools.combinations(experts, count):
            omegas = [omega_by_tokens(runs, name) for name in names]
            losses = bench.losses(merge("ptm", base, [general, *(experts[name] for name in names)], omegas))
            entry: dict[str, Any] = {"skills": list(names), "losses": losses}
            if count == 1:
                alone[names[0]] = losses[names[0]]
            else:
                entry["interference"] = {name: losses[name] - alone[name] for name in names}
                entry["diagnosis"] = diagnose(base, [experts[name] for name in names], list(names))
            found.append(entry)
    return found


def rule(bench: Bench, base: Tensor, experts: dict[str, Tensor], seed: int) -> list[dict[str, Any]]:
    """Experts merged with each other, without the general model, by each method that the rule of correlation can recommend and
    by task arithmetic: what it recommends against what is best."""
    found = []
    for count in range(2, len(experts) + 1):
        for names in itertools.combinations(experts, count):
            members = [experts[name] for name in names]

            def score(theta: Tensor, names: tuple[str, ...] = names) -> float:
                return sum(bench.losses(theta, list(names)).values()) / len(names)

            found.append({"skills": list(names)} | compare(base, members, list(names), score, seed))
    return found
