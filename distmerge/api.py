"""Python functions for the commands ``merge``, ``diagnose``, ``sweep`` and ``window``, with typed results.

    import distmerge as dm

    result = dm.merge(method="ties", models=["a", "b"], base="base", density=0.5, out="merged")
    print(result)

Nothing is printed: ``str(result)`` is what the command would print, and ``as_dict()`` has the same for programs. Error messages
name options by their flags on the command line.
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
"""A model directory, a hub id, or a LoRA adapter on a base ("BASE+ADAPTER")."""


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
        recipe: a .yaml file in mergekit's format or a .toml file in distmerge's. Without one, ``method`` and ``models`` are
            needed.
        out: the directory to create. It must not exist, and it appears only when it is complete.
        method: a method of the catalogue, "auto" (which a diagnosis chooses), or for adapters "cat", "svd" or "extract".
        models: directories or hub ids, in order, optionally with weights: ``["a", ("b", 0.5)]`` or ``{"a": 1, "b": 0.5}``.
        base: the model from which the models were trained.
        general: for method ptm, the model to which the others' task vectors are added.
        options: how the merge is carried out.
        parameters: parameters of the method, such as ``density=0.5``, and its variants, such as ``trim="tensor"``. A name that
            is a keyword of Python takes an underscore: ``lambda_=0.5``. With a recipe in a file only variants are allowed.

    Raises:
        UserError: for an error in the recipe, the models or on the disk; ``out`` does not exist then.
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
        raise UserError(f"--{wrong[0]} belongs to a recipe in flags, but the recipe {recipe} is given")
    return merge_models(recipe_in_file(str(recipe), given, options), Path(out), options)


def diagnose(
    models: Sequence[Reference],
    *,
    base: Reference,
    plot: Reference | None = None,
    tensorboard: Reference | None = None,
    options: DiagnoseOptions | None = None,
) -> Diagnosis:
    """Measure how similar models are and recommend how to merge them, as ``distmerge diagnose`` does.

    Args:
        models: at least two models that were trained from ``base``.
        plot: a directory for the figures cosines.png and layers.png.
        tensorboard: a directory for TensorBoard files with the same figures and the scalars.
        options: how the diagnosis is carried out, and the text on which losses are measured.

    Raises:
        UserError: for an error in the models or the text.
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
    """Evaluate merges by their loss on text, for a grid of values of a parameter or for a greedy soup, as ``distmerge sweep``
    does.

    Args:
        method, models, base, general, parameters: as in :func:`merge`. Method "greedy_soup" keeps the models that do not raise
            the mean loss, and takes no grid.
        skills: globs of text files for each skill by name. The first skill represents the general ability.
        grid: the parameter and its values, such as ``("lambda", [0.2, 0.4])``.
        out: the directory for the merge with the lowest mean loss; None writes none.
        plot: a directory for the figure pareto.png, the first skill against the others.
        options: how the sweep is carried out, and the amount of text for each evaluation.

    Raises:
        UserError: for an error in the models, the grid or the text, or on the disk.
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
    """Merge the blocks of a run's window, or other checkpoints of one model, as ``distmerge window`` does.

    Args:
        members: a run directory, or the models of one run, oldest first.
        out: the directory to create for the merged model, which must not exist; None writes none.
        curve: the learning-rate decay that the weights of rule "mean" stand for: a name (:mod:`distmerge.windows.curves`), a
            function of the share of the window's tokens that have passed, or a table of points. None is "linear".
        quadrature: how a curve is turned into weights: "endpoint" for blocks, "mean" for snapshots.
        rule: "mean" or another rule of the catalogue.
        base: the model from which the rule's task vectors are measured. For a rule that needs one it is by default the oldest
            member.
        explain: whether the result says if a merge should help here, and why.
        plot: a .svg, .png or .pdf file for the weights, the learning rates that they imply, and their frequency response.
        options: the choice of members, and how the merge is carried out.
        parameters: parameters of the rule, as in :func:`merge`.

    Raises:
        UserError: for an error in the members, the curve or the rule, or on the disk.
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
