"""``distmerge sweep``: a parameter over a grid, or a greedy soup, judged by the loss on each named skill; nothing is written
but the model that is picked.

Greedy soup: https://arxiv.org/abs/2203.05482. From the best model on, each next one is kept if the mean loss does not rise.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.files.output import refuse_existing
from distmerge.files.sources import DTYPES, InMemory, Maps
from distmerge.files.stream import Job, Stream, in_memory
from distmerge.judge import Judge, texts_of, tokenizer_of
from distmerge.merging import recipe_toml
from distmerge.merging.execute import settings_of, survey_of
from distmerge.merging.jobs import build
from distmerge.merging.merge import merge
from distmerge.merging.models import open_all, open_any
from distmerge.merging.omegas import with_omegas
from distmerge.merging.pairing import check_structure, pair
from distmerge.merging.recipe import Entry, Recipe, Slice
from distmerge.model import check_fits, load_model, load_tokenizer
from distmerge.quiet import quiet
from distmerge.rules.parameters import PARAMETERS, is_number
from distmerge.rules.task import GlobalTrim, TaskArithmetic, TaskVectors

SOUP = "greedy_soup"


FROM_TASK_VECTORS = (TaskArithmetic, TaskVectors, GlobalTrim)
"""Rules whose result is the base plus something that depends on the task vectors alone."""


class RecipeJudge(Judge):
    """The loss of merged models, which are built in memory inside one model of the same shape.

    Task vectors are computed once, for the first of the recipes that ask for them, and kept in float32.
    """

    def __init__(self, donor: str, skills: dict[str, list[str]], options: argparse.Namespace):
        donor = str(open_any(donor, options.allow_pickle).directory)
        length = options.sequence_length
        texts = texts_of(skills, tokenizer_of(donor), length, options.sequences)
        super().__init__(load_model(donor), texts)
        check_fits(self.model, load_tokenizer(donor), length)
        self.settings, self.allow_pickle = settings_of(options), options.allow_pickle
        self.places = {name: value.view(-1) for name, value in self.model.state_dict().items()}
        self._vectors: dict[str, tuple[InMemory, ...]] = {}
        self._bases: dict[str, Tensor] = {}

    def put(self, recipe: Recipe) -> None:
        """Merge the recipe into the model. All recipes of one judge have the same base and members, in one order."""
        check_structure(recipe)
        models = open_all(recipe, self.allow_pickle)
        pairings = pair(with_omegas(recipe, models), models)
        survey = survey_of(recipe, pairings)
        built = build(recipe, pairings, Maps(), survey.thresholds if survey else [])
        dtypes = {job.name: DTYPES[job.dtype] for job in built}

        def keep(job: Job, offset: int, elements: Tensor) -> None:
            if job.name not in self.places:
                raise UserError(f"{job.name} is no tensor of the model that {recipe.donor}'s config.json describes")
            stop = offset + elements.numel()
            if job.name in self._bases and isinstance(job.rule, FROM_TASK_VECTORS):
                elements = (elements + self._bases[job.name][offset:stop]).to(dtypes[job.name])
            self.places[job.name][offset:stop].copy_(elements)

        with Stream([self.from_vectors(job) for job in built], self.settings, survey) as stream:
            in_memory(stream, keep)

    def from_vectors(self, job: Job) -> Job:
        """The job on task vectors in memory and a base of zeros, where its rule allows that."""
        if not isinstance(job.rule, FROM_TASK_VECTORS) or job.base is None or job.base.dtype == torch.float64:
            return job
        if job.name not in self._vectors:
            base = self._bases[job.name] = job.base.read(0, job.numel).float()
            self._vectors[job.name] = tuple(InMemory(member.read(0, job.numel).float() - base) for member in job.members)
        zeros = InMemory(torch.zeros(1).expand(job.numel))
        return replace(job, dtype="F32", members=self._vectors[job.name], base=zeros)


def run(table: dict[str, Any], skills: dict[str, list[str]], options: argparse.Namespace) -> int:
    """Sweep; print a table, plot, and write the best model if it is to be picked.

    Args:
        table: the recipe in the TOML notation.
        skills: globs of each skill's text.
    """
    if options.pick != bool(options.out):
        raise UserError("--pick and --out DIR belong together: the best model is written there")
    if options.out:
        refuse_existing(Path(options.out))
    soup = options.method == SOUP
    recipe = recipe_toml.from_table(table | ({"method": "mean"} if soup else {}), "")
    with quiet():
        points = greedy(recipe, skills, options) if soup else over_grid(recipe, skills, options)
    for point in points:
        point["mean"] = float(np.mean(list(point["losses"].values())))
    best = min((point for point in points if point["kept"]), key=height)
    print(
        json.dumps({"points": [without_recipe(point) for point in points], "best": best["name"]})
        if options.json
        else as_table(points, best)
    )
    if options.plot:
        pareto(points, best, list(skills), Path(options.plot))
    if options.pick:
        with quiet() if options.json else contextlib.nullcontext():
            merge(best["recipe"], Path(options.out), options)
    return 0


def height(point: dict[str, Any]) -> float:
    """A point's mean loss; what is no number is never the best."""
    return point["mean"] if math.isfinite(point["mean"]) else math.inf


def grid_of(given: str | None) -> tuple[str, list[float]]:
    key, _, values = (given or "").partition("=")
    numbers = values.split(",")
    if key not in PARAMETERS or PARAMETERS[key].holds is None or not all(map(is_finite, numbers)):
        raise UserError(f"--grid must be PARAMETER=X,Y,... such as lambda=0.2,0.4, got {given}")
    return key, [float(value) for value in numbers]


def is_finite(text: str) -> bool:
    return is_number(text) and math.isfinite(float(text))


def over_grid(recipe: Recipe, skills: dict[str, list[str]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A point for each value."""
    key, values = grid_of(options.grid)
    recipes = [replace(recipe, parameters=recipe.parameters | {key: value}) for value in values]
    judge = RecipeJudge(recipe.donor, skills, options)
    points = []
    for value, one in zip(values, recipes, strict=True):
        judge.put(one)
        points.append({"name": f"{key} = {value:g}", "losses": judge.losses(), "recipe": one, "kept": True})
    return points


def greedy(recipe: Recipe, skills: dict[str, list[str]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A point for each model that was tried, in the order of their own losses."""
    entries = [Entry(entry.model, {"weight": 1.0}) for entry in recipe.slices[0].entries]
    judge = RecipeJudge(entries[0].model, skills, options)

    def mean(chosen: list[Entry]) -> tuple[Recipe, dict[str, float]]:
        mixed = Recipe(method="mean", slices=(Slice(tuple(chosen)),), out_dtype=recipe.out_dtype)
        judge.put(mixed)
        return mixed, judge.losses()

    alone = sorted(entries, key=lambda entry: float(np.mean(list(mean([entry])[1].values()))))
    kept: list[Entry] = []
    best = float("inf")
    points = []
    for entry in alone:
        mixed, losses = mean([*kept, entry])
        height = float(np.mean(list(losses.values())))
        joins = height <= best
        if joins:
            kept, best = [*kept, entry], height
        points.append({"name": f"with {Path(entry.model).name}", "losses": losses, "recipe": mixed, "kept": joins})
    return points


def without_recipe(point: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in point.items() if key != "recipe"}


def as_table(points: list[dict[str, Any]], best: dict[str, Any]) -> str:
    names = list(points[0]["losses"])
    width = max(len(point["name"]) for point in points)
    lines = [" " * width + "".join(f"  {name:>10}" for name in [*names, "mean"])]
    for point in points:
        figures = "".join(f"  {value:10.4f}" for value in [*point["losses"].values(), point["mean"]])
        mark = "  <- best" if point is best else "" if point["kept"] else "  left out"
        lines.append(f"{point['name']:<{width}}{figures}{mark}")
    return "\n".join(lines)


def pareto(points: list[dict[str, Any]], best: dict[str, Any], skills: list[str], out: Path) -> None:
    """pareto.png: the loss on the first skill, the general one, against the mean of the others."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot()
    x = [point["losses"][skills[0]] for point in points]
    y = [float(np.mean([point["losses"][name] for name in skills[1:] or skills])) for point in points]
    axes.plot(x, y, marker="o")
    for point, at in zip(points, zip(x, y, strict=True), strict=True):
        axes.annotate(point["name"], at, weight="bold" if point is best else "normal")
    axes.set_xlabel(f"loss on {skills[0]}")
    axes.set_ylabel(f"loss on {', '.join(skills[1:]) or skills[0]}")
    figure.savefig(out / "pareto.png", dpi=120)
