"""Training experts longer makes them better and their merges worse: where it shows at toy size, and what stopping early gives.

Byte-level Llamas of two widths on four kinds of text, full finetuning and LoRA, and a small ViT on turned digits with wrong
labels. Steps 2^k of all experts are merged; rules stop each expert on validation text, scores are of test text. Seeds that are
finished are not run again.

    python benchmarks/overtraining.py [--small] [--seeds N] [--out DIR] [--record]
"""

from __future__ import annotations

import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from overtraining_report import judge_bars, plot, summarise
from overtraining_tasks import Skill, Split, Task, Trainee, digits_task, text_ids, text_task
from report import Report, parser
from torch import Tensor

from distmerge.config.experts import Stopping
from distmerge.experts.adapt import Theta
from distmerge.experts.examples import scores_of
from distmerge.experts.retention import by_decile
from distmerge.experts.stopping import Peak, Plateau
from distmerge.merging.in_memory import LAMBDAS, compare, merge
from distmerge.rundir.layout import write_atomically
from distmerge.studies.report import hits


class Arm(NamedTuple):
    """What is trained: the model, full finetuning or LoRA, to how many steps, evaluated every so many."""

    model: str
    kind: str
    steps: int
    every: int

    @property
    def name(self) -> str:
        return f"{self.model} {self.kind}"


FULL = (
    *(Arm(f"text-{width}", kind, 256, 16) for width in (48, 96) for kind in ("full", "lora")),
    Arm("vit", "full", 1024, 32),
)
SMALL = (Arm("text-48", "full", 16, 4), Arm("vit", "full", 32, 8))
TRACKED = 64


def powers(steps: int) -> list[int]:
    return [1 << power for power in range(steps.bit_length()) if 1 << power <= steps]


def task_of(arm: Arm, seed: int, folder: Path) -> Task:
    small = arm.steps < 64
    if arm.model == "vit":
        return digits_task(seed, 40 if small else 400)
    return text_task(int(arm.model.rpartition("-")[2]), seed, 20 if small else 300, folder)


class Trajectories(NamedTuple):
    """Experts on the way: vectors by skill and step, on the same constant rate; and those of the plateau rule, with the step
    at which it stopped."""

    steps: dict[str, dict[int, Tensor]]
    plateau: dict[str, tuple[int, Tensor]]


def trajectories(task: Task, arm: Arm, seed: int, judge: Theta) -> Trajectories:
    kept = set(powers(arm.steps)) | set(range(arm.every, arm.steps + 1, arm.every))
    steps: dict[str, dict[int, Tensor]] = {}
    plateau: dict[str, tuple[int, Tensor]] = {}
    for name, skill in task.skills.items():
        trainee = Trainee(task, skill, arm.kind, seed)
        steps[name] = {0: trainee.theta.read()}
        for step in range(arm.steps):
            trainee.step(step)
            if step + 1 in kept:
                steps[name][step + 1] = trainee.theta.read()
        plateau[name] = on_plateau(task, arm, skill, seed, judge)
    return Trajectories(steps, plateau)


def on_plateau(task: Task, arm: Arm, skill: Skill, seed: int, judge: Theta) -> tuple[int, Tensor]:
    """An expert under the rule "plateau": one reduction, then the end."""
    trainee, rule = Trainee(task, skill, arm.kind, seed), Plateau(Stopping(rule="plateau"))
    for step in range(arm.steps):
        trainee.step(step, rule.lr_factor)
        if (step + 1) % arm.every == 0 and rule.observe(task.score(judge, trainee.theta.read(), skill.validation)):
            return step + 1, trainee.theta.read()
    return arm.steps, trainee.theta.read()


def stopped_by_merge(task: Task, arm: Arm, base: Tensor, found: Trajectories, judge: Theta) -> dict[str, int]:
    """The step that each expert keeps under the rule "merged", side by side at powers of two: each merges its step with what
    the others are then, a stopped one being its kept step. The trainer's defaults are what is measured."""
    section = Stopping(rule="merged", merge_with=["siblings"])
    rules = {name: Peak(section) for name in found.steps}
    running = set(rules)
    seen: dict[tuple[int, ...], float] = {}
    for step in powers(arm.steps):
        at = {name: step if name in running else rule.best_step for name, rule in rules.items()}
        key = tuple(at.values())
        if key not in seen:
            merged = merge("mean", base, [found.steps[name][own] for name, own in at.items()])
            seen[key] = mean_score(task, judge, merged, "validation")
        running -= {name for name in sorted(running) if rules[name].observe(step, seen[key])}
    return {name: rule.best_step for name, rule in rules.items()}


def mean_score(task: Task, judge: Theta, vector: Tensor, split: str) -> float:
    return statistics.mean(task.score(judge, vector, getattr(skill, split)) for skill in task.skills.values())


def merged_scores(task: Task, base: Tensor, members: list[Tensor], judge: Theta, seed: int) -> dict[str, Any]:
    """Test scores of all methods; task arithmetic with the lambda that validation chooses."""
    by_lambda = {
        scale: mean_score(task, judge, merge("task_arithmetic", base, members, scale), "validation") for scale in LAMBDAS
    }
    chosen = min(by_lambda, key=by_lambda.__getitem__)
    found = compare(base, members, list(task.skills), lambda theta: mean_score(task, judge, theta, "test"), seed)
    scores = found["scores"]
    dare = mean_score(task, judge, merge("dare", base, members, chosen, 0.5, seed), "test")
    methods = {
        "mean": scores["mean"], "task arithmetic": scores[f"task_arithmetic {chosen:g}"], "ties": scores["ties"],
        "dare": dare, "dare_ties": scores["dare_ties"],
    }  # fmt: skip
    return {"methods": methods, "lambda": chosen, "rule": found}


def measure(arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """Everything of one arm and seed, on one thread; kept in a file."""
    path = folder / f"{arm.name.replace(' ', '-')}-{arm.steps}-seed{seed}.json"
    if path.exists():
        return json.loads(path.read_text())
    torch.set_num_threads(1)
    began = time.process_time()
    task = task_of(arm, seed, folder)
    judge = task.plain()
    base = judge.read()
    found = trajectories(task, arm, seed, judge)
    names = list(task.skills)
    curve = []
    for step in powers(arm.steps):
        members = [found.steps[name][step] for name in names]
        own = {name: task.score(judge, found.steps[name][step], task.skills[name].test) for name in names}
        curve.append({"step": step, "own": own} | merged_scores(task, base, members, judge, seed))
    kept = stopped_by_merge(task, arm, base, found, judge)
    ends = {name: step for name, (step, _) in found.plateau.items()}
    choices = {
        "merged": [found.steps[name][kept[name]] for name in names],
        "plateau": [vector for _, vector in found.plateau.values()],
        "truncated": [found.steps[name][ends[name]] for name in names],
    }
    arms = {"full length": curve[-1] | {"steps": dict.fromkeys(names, arm.steps)}}
    for label, members in choices.items():
        own = {name: task.score(judge, member, task.skills[name].test) for name, member in zip(names, members, strict=True)}
        scores = merged_scores(task, base, members, judge, seed)
        arms[label] = {"own": own, "steps": kept if label == "merged" else ends} | scores
    full = [found.steps[name][arm.steps] for name in names]
    hard = difficulties(arm, seed, judge, folder)
    retained = {
        label: retention(task, base, members, judge, hard)
        for label, members in (("full length", full), ("merged", choices["merged"]))
    }
    result = {"arm": arm._asdict(), "seed": seed, "parameters": base.numel(), "curve": curve, "arms": arms}
    result |= {"retention": retained, "base": mean_score(task, judge, base, "test"), "seconds": time.process_time() - began}
    write_atomically(path, json.dumps(result) + "\n")
    return result


def tracked(skill: Skill) -> Split:
    return Split(skill.train.inputs[:TRACKED], skill.train.labels[:TRACKED])


def difficulties(arm: Arm, seed: int, judge: Theta, folder: Path) -> dict[str, Tensor]:
    """EL2N of the tracked examples after 32 steps of an expert of another seed, from a base of that seed."""
    task = task_of(arm, seed + 1000, folder)
    found = {}
    for name, skill in task.skills.items():
        stranger = Trainee(task, skill, arm.kind, seed + 1000)
        for step in range(min(32, arm.steps)):
            stranger.step(step)
        loss, error, right = task.hits(judge, stranger.theta.read(), tracked(skill))
        found[name] = scores_of(loss, error, right, torch.ones_like(right)).el2n
    return found


def retention(task: Task, base: Tensor, members: list[Tensor], judge: Theta, hard: dict[str, Tensor]) -> dict[str, Any]:
    """By tenths of the difficulty: loss shares, and P(merge right | expert right). Where labels are wrong on purpose, the same
    for these and for the others."""
    merged = merge("mean", base, members)
    rows: dict[str, list[Tensor]] = {"difficulty": [], "expert": [], "merge": [], "e": [], "m": [], "both": [], "wrong": []}
    for member, (name, skill) in zip(members, task.skills.items(), strict=True):
        part = tracked(skill)
        expert, joint = task.hits(judge, member, part), task.hits(judge, merged, part)
        rows["difficulty"].append(hard[name])
        rows["expert"].append(expert[0].double().mean(1))
        rows["merge"].append(joint[0].double().mean(1))
        rows["e"].append(expert[2].sum(1).double())
        rows["m"].append(joint[2].sum(1).double())
        rows["both"].append((expert[2] & joint[2]).sum(1).double())
        rows["wrong"].append(skill.wrong[:TRACKED] if skill.wrong is not None else torch.zeros(len(part.inputs)).bool())
    flat = {key: torch.cat(values) for key, values in rows.items()}
    losses = {"expert": flat["expert"], "merge": flat["merge"]}
    right = {"expert": flat["e"], "merge": flat["m"], "both": flat["both"]}
    found: dict[str, Any] = {"deciles": by_decile(flat["difficulty"], None, losses, right)}
    for label, chosen in (("wrong", flat["wrong"]), ("right", ~flat["wrong"])):
        if chosen.any() and flat["wrong"].any():
            found[label] = {
                "expert": float(flat["e"][chosen].mean()),
                "retention": float(flat["both"][chosen].sum() / flat["e"][chosen].sum().clamp(min=1)),
            }
    return found


def main() -> None:
    options = parser(__doc__, seeds=3).parse_args()
    report = Report("overtraining", options)
    arms, seeds = (SMALL, [0]) if options.small else (FULL, list(range(options.seeds)))
    text_ids(report.out)
    jobs = [(arm, seed) for arm in arms for seed in seeds]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(measure, arm, seed, report.out) for arm, seed in jobs]
        results = [waited.result() for waited in waiting]
    found = {}
    for arm in arms:
        own = [result for result in results if Arm(**result["arm"]) == arm]
        found[arm.name] = summarise(own)
        report.say(f"{arm.name}: best step {found[arm.name]['peak_step']}")
    report.data |= {"arms": found, "cpu_seconds": sum(result["seconds"] for result in results)}
    report.data["rule"] = hits([point["rule"] for result in results for point in result["curve"]])
    judge_bars(report, found)
    plot(report, found)
    report.finish()


if __name__ == "__main__":
    main()
