"""Merging, diagnosing, sweeping and windows from Python: what the commands of the same names do, with typed results.

    import distmerge as dm

    result = dm.merge(method="ties", models=["a", "b"], base="base", density=0.5, out="merged")
    print(result)

Errors name an option by its flag on the command line. Nothing is printed; every result says what the command would print
when it is turned into a string, and has it for programs in ``as_dict()``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from distmerge.errors import UserError
from distmerge.files.output import refuse_existing
from distmerge.merging.assemble import Models, check_grid, check_parameters, named, recipe_in_file, recipe_of
from distmerge.merging.options import DiagnoseOptions, MergeOptions, SweepOptions
from distmerge.merging.recipe import Setting
from distmerge.merging.results import MergeResult
from distmerge.windows.options import MEAN, WindowOptions, way_of

if TYPE_CHECKING:
    from distmerge.merging.diagnosis import Diagnosis
    from distmerge.merging.sweep import SweepResult
    from distmerge.windows.curves import Curve, Quadrature
    from distmerge.windows.merge import WindowResult

Reference = str | Path
"""A model's directory, a hub id, or a LoRA adapter on a base ("BASE+ADAPTER")."""


def merge(
    recipe: Reference | None = None,
    *,
    out: Reference,
    method: str | None = None,
    models: Models = (),
    base: Reference | None = None,
    general: Reference | None = None,
    options: MergeOptions | None = None,
    **parameters: Setting,
) -> MergeResult:
    """Merge models into the directory ``out``, as ``distmerge merge`` does.

    Args:
        recipe: a .yaml file of mergekit's or a .toml file of distmerge's. Without one, ``method`` and ``models`` are needed.
        out: must not exist yet; it appears when it is whole.
        method: one of the catalogue's, "auto" (what a diagnosis recommends), or for adapters "cat", "svd", "extract".
        models: directories or hub ids, in order, each perhaps with its weight: ``["a", ("b", 0.5)]`` or ``{"a": 1, "b": 0.5}``.
        base: what the models were trained from.
        general: for ptm, the model to which the others' task vectors are added.
        options: how the merge is done.
        parameters: of the method, such as ``density=0.5``, and its variants, such as ``trim="tensor"``. One whose name is a
            word of Python's takes an underscore: ``lambda_=0.5``. With a recipe in a file, variants alone.

    Raises:
        UserError: for anything wrong with the recipe, the models or the disk; nothing is left under the name ``out``.
    """
    options = options or MergeOptions()
    given = check_parameters(parameters, method)
    from distmerge.merging.merge import merge_models

    if recipe is None:
        if method is None or not models:
            raise UserError("distmerge merge needs a RECIPE, or --method and --model")
        whole = recipe_of(method, named(models), text_of(base), text_of(general), given, options)
        return merge_models(whole, Path(out), options)
    flags = {"method": method, "base": base, "general": general, "model": models or None}
    if wrong := [key for key, value in flags.items() if value is not None]:
        raise UserError(f"--{wrong[0]} belongs to a recipe in flags, got the recipe {recipe}, too")
    return merge_models(recipe_in_file(str(recipe), given, options), Path(out), options)


def diagnose(
    models: Sequence[Reference],
    *,
    base: Reference,
    plot: Reference | None = None,
    tensorboard: Reference | None = None,
    options: DiagnoseOptions | None = None,
) -> Diagnosis:
    """Say how alike models are, and how to merge them, as ``distmerge diagnose`` does.

    Args:
        models: at least two, trained from ``base``.
        plot: a directory for cosines.png and layers.png.
        tensorboard: a directory for the same figures and scalars, as TensorBoard reads them.
        options: how it is done, and the text on which losses are measured.

    Raises:
        UserError: for anything wrong with the models or the text.
    """
    from distmerge.merging.diagnose import diagnose_models
    from distmerge.plotting import require_matplotlib

    if plot is not None:
        require_matplotlib("--plot")
    diagnosis = diagnose_models([str(model) for model in models], str(base), options or DiagnoseOptions())
    if plot is not None:
        from distmerge.merging.plots import draw

        draw(diagnosis, Path(plot))
    if tensorboard is not None:
        from distmerge.merging.plots import to_tensorboard

        to_tensorboard(diagnosis, Path(tensorboard))
    return diagnosis


def sweep(
    *,
    method: str,
    models: Models,
    skills: Mapping[str, Sequence[str]],
    grid: tuple[str, Sequence[float]] | None = None,
    base: Reference | None = None,
    general: Reference | None = None,
    out: Reference | None = None,
    plot: Reference | None = None,
    options: SweepOptions | None = None,
    **parameters: Setting,
) -> SweepResult:
    """Judge merges by their loss on text, as ``distmerge sweep`` does: a parameter over a grid, or a greedy soup.

    Args:
        method, models, base, general, parameters: as of :func:`merge`; "greedy_soup" keeps the models that do not raise the
            mean loss, and takes no grid.
        skills: globs of text for each skill by its name; the first one stands for the general ability.
        grid: the parameter and its values, such as ``("lambda", [0.2, 0.4])``.
        out: where the model of the lowest mean loss is written; None writes none.
        plot: a directory for pareto.png, the first skill against the others.
        options: how it is done, and how much text a point is judged on.

    Raises:
        UserError: for anything wrong with the models, the grid, the text or the disk.
    """
    from distmerge.merging.merge import merge_models
    from distmerge.plotting import require_matplotlib

    options = options or SweepOptions()
    if plot is not None:
        require_matplotlib("--plot")
    if out is not None:
        refuse_existing(Path(out))
    recipe = recipe_of(method, named(models), text_of(base), text_of(general), check_parameters(parameters, method), options)
    if grid is not None:
        check_grid(*grid)
    from distmerge.merging.sweep import draw_pareto, sweep_recipe

    result = sweep_recipe(recipe, grid, skills, options)
    if plot is not None:
        draw_pareto(result, Path(plot))
    return result if out is None else replace(result, merged=merge_models(result.best.recipe, Path(out), options))


def window(
    members: Reference | Sequence[Reference],
    *,
    out: Reference | None = None,
    curve: Curve | None = None,
    quadrature: Quadrature = "endpoint",
    rule: str = MEAN,
    base: Reference | None = None,
    explain: bool = False,
    plot: Reference | None = None,
    options: WindowOptions | None = None,
    **parameters: Setting,
) -> WindowResult:
    """Merge a run's blocks, or other checkpoints of one model, as ``distmerge window`` does.

    Args:
        members: a run's directory, or models of one run, oldest first.
        out: the merged model's directory, which must not exist yet; None writes none.
        curve: of the learning rate, whose weights rule "mean" takes: a name (``distmerge.windows.curves``), a function of
            the share of the window's tokens that are behind, or a table of points; None for "linear".
        quadrature: how a curve becomes weights: "endpoint" for blocks, "mean" for snapshots.
        rule: "mean", or any other of the catalogue that needs no base, or takes one.
        base: what the rule's task vectors start from. A rule that needs one, and is given none, takes the oldest member.
        explain: whether the result says if merging should help here, and why.
        plot: a .svg, .png or .pdf file for the weights, what learning rate they imply, and the frequency response.
        options: which members, and how it is done.
        parameters: of the rule, as of :func:`merge`.

    Raises:
        UserError: for anything wrong with the members, the curve, the rule or the disk.
    """
    from distmerge.plotting import check_picture

    references = [str(members)] if isinstance(members, str | Path) else [str(member) for member in members]
    if plot is not None:
        check_picture("--plot", str(plot))
    way = way_of(rule, curve, quadrature, text_of(base), check_parameters(parameters, rule), drawn=plot is not None)
    from distmerge.windows.merge import merge_window

    place = None if out is None else Path(out)
    return merge_window(references, way, options or WindowOptions(), place, explain, None if plot is None else Path(plot))


def text_of(reference: Reference | None) -> str | None:
    return None if reference is None else str(reference)
