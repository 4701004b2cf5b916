"""``distmerge ptm``: the parallel-train-then-merge (PTM) experiment, from pretraining a base to a report.

The runs of each seed train these models, each in a directory of its own; finished runs are not repeated:
- from the base: the general model, and one expert for each skill;
- from the general model: each skill (continued finetuning, CFT), also with fewer steps and with general text replayed;
- from the base: general and skill text together (retraining, RT).
Then merges of them are measured on test texts that no run has seen.

Source: Merge to Learn, https://arxiv.org/abs/2410.12937; WiSE-FT, https://arxiv.org/abs/2109.01903
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.launch.ranks import die_with_parent
from distmerge.rundir.layout import RunDirectory, write_atomically
from distmerge.studies.config import PtmConfig, Runs, Texts
from distmerge.studies.texts import KINDS, kinds_here, of_files, write_parts

Trainer = Callable[[TrainConfig, int], None]
"""Trains a run to its end, with the given number of ranks."""


def experiment(config: PtmConfig, train: Trainer) -> dict[str, Any]:
    """Train what is not finished yet, measure, and write ``OUT/results.json`` and ``OUT/report.html``.

    Returns:
        the content of results.json.

    Raises:
        UserError: when texts are missing, or ``OUT`` holds another experiment.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = prepare_texts(config, out / "texts")
    if config.processes > 1 and len(config.seeds) > 1:
        with ProcessPoolExecutor(config.processes, multiprocessing.get_context("spawn"), die_with_parent) as pool:
            waiting = [pool.submit(one_seed, config, seed, texts, train) for seed in config.seeds]
            measured = [result.result() for result in waiting]
    else:
        measured = [one_seed(config, seed, texts, train) for seed in config.seeds]

    from distmerge.studies.report import html, summarise  # imports matplotlib

    results = summarise(config, measured)
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(out / "report.html", html(results))
    return results


def prepare_texts(config: PtmConfig, folder: Path) -> Texts:
    """Write every text's parts into ``folder``.

    Raises:
        UserError: naming the text that is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = config.skills or {name: [] for name in ("code", "headers", "arithmetic")}
    for name, patterns in wanted.items():
        if not patterns and name not in KINDS:
            raise UserError(f"config.skills.{name} must have files, or be named one of {', '.join(KINDS)}, got no files")
    kinds = kinds_here({*(name for name, patterns in wanted.items() if not patterns), "prose"})
    skills: dict[str, str] = {}
    for name, patterns in wanted.items():
        if patterns:
            skills[name] = of_files(f"config.skills.{name}", patterns)
        elif name in kinds:
            skills[name] = kinds[name]
        elif config.skills:
            raise UserError(f"config.skills.{name} must have files where Python's installation lacks that text, got none")
    if not skills:
        raise UserError("config.skills must be given where Python has no library sources, got none")
    general = of_files("config.general", config.general) if config.general else kinds.get("prose", "")
    other = of_files("config.other_general", config.other_general) if config.other_general else ""
    if config.general and not config.other_general:
        other = kinds.get("prose", "")
    if not general:
        raise UserError("config.general must be given where Python has no library sources, got none")

    def parts(name: str, text: str) -> dict[str, str]:
        return write_parts(text, folder, name, config.characters)

    return Texts(
        parts("general", general), {name: parts(name, text) for name, text in skills.items()},
        parts("other", other) if other else None,
    )  # fmt: skip


def one_seed(config: PtmConfig, seed: int, texts: Texts, train: Trainer) -> dict[str, Any]:
    """Train and measure all models of a seed. The result is kept in ``OUT/seed-N/measured.json`` and used again."""
    folder = Path(config.out) / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "measured.json"
    wanted = config.model_dump(mode="json", exclude={"out", "seeds", "processes", "ranks"})
    said = json.dumps(wanted | {"pretraining": [Path(file).name for file in pretraining_texts(config, texts)]}, sort_keys=True)
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["config"] == said:
            return kept
    terminal = sys.stderr

    def announced(run: TrainConfig, ranks: int) -> None:
        print(f"seed {seed}: training {Path(run.run_dir).name} for {run.steps} steps", file=terminal, flush=True)
        train(run, ranks)

    with open(folder / "log.txt", "a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        runs = train_all(config, seed, texts, announced)
    print(f"seed {seed}: training is done, see {folder / 'log.txt'}; measuring", file=terminal, flush=True)

    from distmerge.studies.measure import measure  # imports torch

    measured = {"seed": seed, "config": said} | measure(config, seed, texts, runs)
    write_atomically(path, json.dumps(measured) + "\n")
    return measured


def pretraining_texts(config: PtmConfig, texts: Texts) -> list[str]:
    """The files that the base is pretrained on."""
    beside = list(texts.skills.values()) if config.pretraining == "all" else []
    return [parts["pretraining"] for parts in (texts.general, *beside)]


def train_all(config: PtmConfig, seed: int, texts: Texts, train: Trainer) -> Runs:
    """Train all models of a seed that are not finished, in an order in which each run's start exists.

    Raises:
        UserError: when a run has diverged, or was trained with another configuration.
    """

    def model(name: str, steps: int, files: list[str], start: str | None, **more: Any) -> str:
        run = config.run(seed, name, steps, files, start, **more)
        directory = RunDirectory(run.run_dir)
        directory.check(run)
        done = directory.finished(1)
        if done is not None and done["steps"] != run.steps:
            trained = f"{run.run_dir} was trained for {done['steps']} steps"
            raise UserError(f"{trained}, but config.steps now says {run.steps}; take another out")
        if done is None:
            train(run, config.ranks)
        elif done.get("diverged"):
            raise UserError(f"{run.run_dir} diverged: {done['diverged']}; take another optimizer.lr, and another out")
        return str(directory.final)

    steps, g, d = config.steps, texts.general["train"], {name: parts["train"] for name, parts in texts.skills.items()}
    base = config.model.path or model("base", steps.base, pretraining_texts(config, texts), None)
    general = model("general", steps.general, [g], base)
    experts, finetuned, shorter, replayed, retrained = {}, {}, {}, {}, {}
    for name, file in d.items():
        experts[name] = model(f"expert-{name}", steps.skill, [file], base, expert={"skill": name})
        cft = {"skill": name, "base": base}
        finetuned[name] = model(f"cft-{name}", steps.skill, [file], general, expert=cft)
        shorter[name] = {
            share: model(f"shorter-{name}-{share:g}", config.steps_of(share), [file], general, expert=cft, share=share)
            for share in config.shorter
        }
        replayed[name] = {}
        for source, share in replays(config, texts):
            # As many skill tokens as without replay; the general ones are added to them.
            more = {"data": {"replay": {"share": share, "files": [texts_of(source, texts)]}}}
            label = f"{share:g} {source}"
            run = f"replay-{name}-{source}-{share:g}"
            replayed[name][label] = model(run, round(steps.skill / (1 - share)), [file], general, expert=cft, **more)
        share = steps.skill / (steps.skill + steps.general)
        both = {"data": {"replay": {"share": share, "files": [file]}}}
        retrained[name] = model(f"rt-{name}", steps.general + steps.skill, [g], base, **both)
    return Runs(base, general, experts, finetuned, shorter, replayed, retrained)


def replays(config: PtmConfig, texts: Texts) -> list[tuple[str, float]]:
    """Source and share of each replay arm: every share with the general model's own text, the first also with other text."""
    own = [("own", share) for share in config.replay]
    return own + [("other", share) for share in config.replay[:1] if texts.other is not None]


def texts_of(source: str, texts: Texts) -> str:
    """The training file of a source of replay."""
    if source == "own":
        return texts.general["train"]
    assert texts.other is not None
    return texts.other["train"]
