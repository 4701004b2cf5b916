"""The measurements of ``distmerge ptm`` on one seed's models: losses of merges and of all other arms on test texts."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmerge.experts.adapt import Theta
from distmerge.judge import Judge, texts_of
from distmerge.merging.in_memory import compare, diagnose, line, merge, read_model
from distmerge.merging.omegas import token_ratio, trained_tokens
from distmerge.model import load_model
from distmerge.studies.config import PtmConfig, Runs, Texts
from distmerge.studies.curves import SHORTER
from distmerge.theta.flat import FlatParameters

BATCH = 32


class Bench:
    """One model in memory, which evaluates parameter vectors on the test texts."""

    def __init__(self, config: PtmConfig, texts: Texts, base: str):
        self.origin = base
        model = load_model(base)
        self.theta = Theta(model, FlatParameters(model))
        files = {name: [file] for name, file in texts.tests.items()}
        tests = texts_of(files, config.tokenizer, config.sequence_length, config.eval_sequences, "the test text {name}")
        self.judge = Judge(model, tests, BATCH)

    def vector(self, directory: str) -> Tensor:
        """The parameters of a model in a directory, ``[n]``."""
        return self.theta.of(read_model(directory, self.origin))

    def losses(self, theta: Tensor, names: list[str] | None = None) -> dict[str, float]:
        """The loss of the model with parameters ``theta [n]`` on the named test texts, by default all, in nats per token."""
        return self.judge.losses_of(self.theta.holding(theta), names)


def measure(config: PtmConfig, seed: int, texts: Texts, runs: Runs) -> dict[str, Any]:
    """Measure all models and merges of a seed.

    Returns:
        JSON: ``points``, one for each arm, skill and omega; ``omega``, |D| / |G| by skill; ``several``, merges of several
        skills; ``rule``, merges that test how well a diagnosis recommends a method.
    """
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
    """One measured model. ``tokens`` and ``steps`` are those of its arm's training from the base or the general model on, which
    the run directory ``run`` records; None for an arm without training."""
    cost = json.loads((Path(run) / "training.json").read_text()) if run else {"tokens": 0, "steps": 0}
    found = {"arm": arm, "skill": skill, "losses": losses, "tokens": cost["tokens"], "steps": cost["steps"]}
    return found if omega is None else found | {"omega": omega}


def omega_by_tokens(runs: Runs, name: str) -> float:
    """|D| / |G| of a skill, at most 1."""
    d, g = (trained_tokens(Path(path), name) for path in (runs.experts[name], runs.general))
    return token_ratio(d, g)


def several(bench: Bench, runs: Runs, base: Tensor, general: Tensor, experts: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Merge one, two and three skills at a time into the general model, each with its own |D| / |G|. The ``interference`` of a
    skill is the rise of its loss over the merge with this skill alone."""
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
    """Merge experts with each other, without the general model, by every method that a diagnosis can recommend and by task
    arithmetic, to compare the recommended method with the best one."""
    found = []
    for count in range(2, len(experts) + 1):
        for names in itertools.combinations(experts, count):
            members = [experts[name] for name in names]

            def score(theta: Tensor, names: tuple[str, ...] = names) -> float:
                return sum(bench.losses(theta, list(names)).values()) / len(names)

            found.append({"skills": list(names)} | compare(base, members, list(names), score, seed))
    return found
