"""Sweeps: merges along a grid of a parameter, or for a greedy soup, are judged by their loss on each skill. Nothing is written.

A greedy soup (https://arxiv.org/abs/2203.05482) takes the models in the order of their own losses, best first, and keeps each
one if the mean loss of the soup does not rise with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.files.header import FLOATS
from distmerge.files.sources import DTYPES, InMemory, Maps
from distmerge.files.stream import Job, Stream, in_memory
from distmerge.judge import Judge, texts_of, tokenizer_of
from distmerge.merging.execute import settings_of, survey_of
from distmerge.merging.jobs import build
from distmerge.merging.models import open_all, open_any
from distmerge.merging.omegas import with_omegas
from distmerge.merging.options import SweepOptions
from distmerge.merging.pairing import check_structure, pair
from distmerge.merging.recipe import Entry, Recipe, Slice
from distmerge.merging.results import MergeResult
from distmerge.model import check_fits, load_model, load_tokenizer
from distmerge.rules import catalogue

SOUP = "greedy_soup"

Skills = Mapping[str, Sequence[str]]
"""Globs of each skill's text, by the skill's name; the first one stands for the general ability."""


class RecipeJudge(Judge):
    """Measures the loss of merged models, which are written into one model in memory.

    Task vectors are computed once, for the first recipe that needs them, and kept in float32.

    Args:
        donor: the model whose configuration and tokenizer are used.
    """

    def __init__(self, donor: str, skills: Skills, options: SweepOptions):
        donor = str(open_any(donor, options.allow_pickle).directory)
        length = options.text.sequence_length
        texts = texts_of(skills, tokenizer_of(donor), length, options.text.sequences)
        super().__init__(load_model(donor), texts)
        check_fits(self.model, load_tokenizer(donor), length)
        self.settings, self.allow_pickle = settings_of(options), options.allow_pickle
        self.places = {name: value.view(-1) for name, value in self.model.state_dict().items()}
        self._vectors: dict[str, tuple[InMemory, ...]] = {}
        self._bases: dict[str, Tensor] = {}

    def put(self, recipe: Recipe) -> None:
        """Merge the recipe into the model. All recipes of one judge must have the same base and members, in the same order."""
        check_structure(recipe)
        models = open_all(recipe, self.allow_pickle)
        recipe, _ = with_omegas(recipe, models)
        pairings = pair(recipe, models)
        survey = survey_of(recipe, pairings)
        built = build(recipe, pairings, Maps(), survey.thresholds if survey else [])
        allowed = catalogue.entry(recipe.method).from_vectors
        vectors = {job.name for job in built if allowed and has_vectors(job)}
        dtypes = {job.name: DTYPES[job.dtype] for job in built}

        def keep(job: Job, offset: int, elements: Tensor) -> None:
            if job.name not in self.places:
                raise UserError(f"{job.name} is not a tensor of the model that {recipe.donor}'s config.json describes")
            stop = offset + elements.numel()
            if job.name in vectors:
                elements = (elements + self._bases[job.name][offset:stop]).to(dtypes[job.name])
            self.places[job.name][offset:stop].copy_(elements)

        with Stream([self.from_vectors(job) if job.name in vectors else job for job in built], self.settings, survey) as stream:
            in_memory(stream, keep)

    def from_vectors(self, job: Job) -> Job:
        """The same job on the task vectors in memory, with a base of zeros."""
        assert job.base is not None
        if job.name not in self._vectors:
            base = self._bases[job.name] = job.base.read(0, job.numel).float()
            self._vectors[job.name] = tuple(InMemory(member.read(0, job.numel).float() - base) for member in job.members)
        zeros = InMemory(torch.zeros(1).expand(job.numel))
        return replace(job, dtype="F32", members=self._vectors[job.name], base=zeros)


def has_vectors(job: Job) -> bool:
    """Whether a tensor has task vectors that can be kept in float32: it is floating point and its base is not float64."""
    return job.dtype in FLOATS and job.base is not None and job.base.dtype != torch.float64


@dataclass(frozen=True)
class SweepPoint:
    """One merge of a sweep.

    Attributes:
        name: what distinguishes it, such as "lambda = 0.5".
        losses: on each skill, in nats per token.
        kept: whether it can be the best; of a greedy soup, whether the model that was added stayed in.
        mean: of the losses.
        recipe: by which its model can be written.
    """

    name: str
    losses: dict[str, float]
    kept: bool
    mean: float
    recipe: Recipe

    @property
    def height(self) -> float:
        """The mean loss for comparisons. One that is not finite counts as infinite, and is never the best."""
        return self.mean if math.isfinite(self.mean) else math.inf

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "losses": self.losses, "kept": self.kept, "mean": self.mean}


@dataclass(frozen=True)
class SweepResult:
    """The points of a sweep.

    Attributes:
        points: in the order in which they were tried.
        merged: the model of the best point, if it was written.
    """

    points: tuple[SweepPoint, ...]
    merged: MergeResult | None = None

    @property
    def best(self) -> SweepPoint:
        """The point with the lowest mean loss among those that were kept."""
        return min((point for point in self.points if point.kept), key=lambda point: point.height)

    def as_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {"points": [point.as_dict() for point in self.points], "best": self.best.name}

    def __str__(self) -> str:
        best = self.best
        names = list(self.points[0].losses)
        width = max(len(point.name) for point in self.points)
        lines = [" " * width + "".join(f"  {name:>10}" for name in [*names, "mean"])]
        for point in self.points:
            figures = "".join(f"  {value:10.4f}" for value in [*point.losses.values(), point.mean])
            mark = "  <- best" if point is best else "" if point.kept else "  left out"
            lines.append(f"{point.name:<{width}}{figures}{mark}")
        return "\n".join(lines)


Grid = tuple[str, Sequence[float]]
"""A parameter's name, and the values to try."""


def sweep_recipe(recipe: Recipe, grid: Grid | None, skills: Skills, options: SweepOptions) -> SweepResult:
    """Judge a recipe at each value of a grid or, if its method is "greedy_soup", build a soup of its models.

    Raises:
        UserError: for anything wrong with the recipe, the models or the text.
    """
    if recipe.method == SOUP:
        return greedy_soup(recipe, skills, options)
    if grid is None:
        raise UserError("--grid must be PARAMETER=X,Y,... such as lambda=0.2,0.4, got None")
    return sweep_grid(recipe, *grid, skills, options)


def sweep_grid(recipe: Recipe, parameter: str, values: Sequence[float], skills: Skills, options: SweepOptions) -> SweepResult:
    """One point for each value of a parameter of the recipe."""
    recipes = [replace(recipe, parameters=recipe.parameters | {parameter: value}) for value in values]
    judge = RecipeJudge(recipe.donor, skills, options)
    points: list[SweepPoint] = []
    for value, one in zip(values, recipes, strict=True):
        judge.put(one)
        points.append(judged(f"{parameter} = {value:g}", judge.losses(), one))
    return SweepResult(tuple(points))


def greedy_soup(recipe: Recipe, skills: Skills, options: SweepOptions) -> SweepResult:
    """One point for each of the recipe's models, in the order of their own losses: the soup so far with that model added."""
    entries = [Entry(entry.model, {"weight": 1.0}) for entry in recipe.slices[0].entries]
    judge = RecipeJudge(entries[0].model, skills, options)

    def mixed(chosen: list[Entry]) -> tuple[Recipe, dict[str, float]]:
        mean = Recipe(method="mean", slices=(Slice(tuple(chosen)),), out_dtype=recipe.out_dtype)
        judge.put(mean)
        return mean, judge.losses()

    alone = sorted(entries, key=lambda entry: mean_of(mixed([entry])[1]))
    kept: list[Entry] = []
    best = math.inf
    points: list[SweepPoint] = []
    for entry in alone:
        mean, losses = mixed([*kept, entry])
        joins = mean_of(losses) <= best
        if joins:
            kept, best = [*kept, entry], mean_of(losses)
        points.append(judged(f"with {Path(entry.model).name}", losses, mean, joins))
    return SweepResult(tuple(points))


def judged(name: str, losses: dict[str, float], recipe: Recipe, kept: bool = True) -> SweepPoint:
    return SweepPoint(name, losses, kept, mean_of(losses), recipe)


def mean_of(losses: dict[str, float]) -> float:
    return float(np.mean(list(losses.values())))


def draw_pareto(result: SweepResult, out: Path) -> None:
    """Write pareto.png into ``out``: the mean loss on the other skills over the loss on the first, the general ability."""
    from matplotlib.figure import Figure

    out.mkdir(parents=True, exist_ok=True)
    points, best = result.points, result.best
    general, *others = points[0].losses
    figure = cast(Any, Figure(figsize=(6, 5), layout="constrained"))
    axes = figure.add_subplot()
    x = [point.losses[general] for point in points]
    y = [float(np.mean([point.losses[name] for name in others or [general]])) for point in points]
    axes.plot(x, y, marker="o")
    for point, at in zip(points, zip(x, y, strict=True), strict=True):
        axes.annotate(point.name, at, weight="bold" if point is best else "normal")
    axes.set_xlabel(f"loss on {general}")
    axes.set_ylabel(f"loss on {', '.join(others) or general}")
    figure.savefig(out / "pareto.png", dpi=120)
