"""The verbs ``merge``, ``diagnose`` and ``sweep``. Slow imports come only after the flags and the recipe are checked."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.files.output import refuse_existing
from distmerge.merging.assemble import Named, check_grid, recipe_in_file, recipe_of
from distmerge.merging.options import CHUNK, DiagnoseOptions, MergeOptions, SweepOptions, TextOptions
from distmerge.merging.recipe import SHARD_SIZE, Recipe, Setting
from distmerge.plotting import require_matplotlib
from distmerge.quiet import quiet
from distmerge.rules import catalogue
from distmerge.rules.parameters import PARAMETERS, VARIANTS, is_number
from distmerge.rules.plugins import load_plugins

PARAMETER_FLAGS = [
    key for key, parameter in PARAMETERS.items() if key != "weight" and parameter.holds is not None and key not in VARIANTS
]
SWITCHES = [key for key, parameter in PARAMETERS.items() if parameter.holds is None and key != "rescale"]


def add_parsers(verbs: Any) -> None:
    merge = verbs.add_parser("merge", help="merge models by a recipe or by flags", allow_abbrev=False)
    merge.add_argument("recipe", nargs="?", metavar="RECIPE.yaml|.toml", help="mergekit's YAML, or distmerge's TOML")
    merge.add_argument("--verify", metavar="DIR", help="hash a merged model and compare with its merge.json")
    add_output_flags(merge)
    add_recipe_flags(merge)
    add_run_flags(merge)
    diagnose = verbs.add_parser("diagnose", help="how similar models are, and how to merge them", allow_abbrev=False)
    diagnose.add_argument("models", nargs="+", metavar="MODEL")
    diagnose.add_argument("--base", required=True, metavar="MODEL", help="what they were trained from")
    diagnose.add_argument("--json", action="store_true", help="print everything as one JSON object")
    diagnose.add_argument("--plot", metavar="DIR", help="write cosines.png and layers.png")
    diagnose.add_argument("--tensorboard", metavar="DIR", help="write figures and scalars for TensorBoard")
    diagnose.add_argument("--files", nargs="+", metavar="GLOB", help="text on which loss barriers and KL are measured")
    diagnose.add_argument("--sequence-length", type=int, default=128, help="tokens per sequence")
    diagnose.add_argument("--sequences", type=int, default=64, help="sequences drawn from the text")
    add_run_flags(diagnose)
    sweep = verbs.add_parser(
        "sweep", help="try a grid of values of a merge's parameter, judged by the loss on skills", allow_abbrev=False
    )
    sweep.add_argument("--grid", metavar="KEY=X,Y,...", help="the parameter and its values, such as lambda=0.2,0.4,0.8")
    sweep.add_argument(
        "--skill", action="append", metavar="NAME=GLOB", help="text of a skill; may be repeated; the first is the general one"
    )
    sweep.add_argument("--pick", action="store_true", help="write the model with the lowest mean loss to --out")
    sweep.add_argument("--json", action="store_true", help="print the points as one JSON object")
    sweep.add_argument("--plot", metavar="DIR", help="write pareto.png: the loss on the other skills over the first's")
    sweep.add_argument("--sequence-length", type=int, default=128, help="tokens per sequence")
    sweep.add_argument("--sequences", type=int, default=64, help="sequences drawn from each text")
    add_output_flags(sweep)
    add_recipe_flags(sweep)
    add_run_flags(sweep)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="the merged model; must not exist")
    parser.add_argument(
        "--shard-size", default=SHARD_SIZE, metavar="SIZE", help="the largest file of the output, such as 500MB"
    )
    parser.add_argument("--stochastic", type=int, metavar="SEED", help="round to bfloat16 stochastically, with this seed")
    parser.add_argument("--report", action="store_true", help="diagnose the inputs in the same pass, into DIR/report.json")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("a recipe in flags")
    flags.add_argument(
        "--method",
        help=f"one of {', '.join(catalogue.names())}; auto (what diagnose recommends); or cat, svd, extract, which make a LoRA",
    )
    flags.add_argument("--base", metavar="MODEL", help="what the others were trained from")
    flags.add_argument("--general", metavar="MODEL", help="for ptm: the model to which the skills are added")
    flags.add_argument(
        "--model", action="append", metavar="MODEL[:WEIGHT]", help="a model; may be repeated (default weight: 1)"
    )
    add_parameter_flags(flags)
    flags.add_argument("--rank", type=int, help="the rank of the adapter that svd and extract make")
    flags.add_argument("--dtype", help="round the inputs to this dtype first")
    flags.add_argument("--out-dtype", help="the output's dtype")
    flags.add_argument("--tokenizer", metavar="SOURCE", help="the output's tokenizer: base, union or a model")
    add_form_flags(flags)


def add_parameter_flags(flags: argparse._ActionsContainer) -> None:
    """A flag for each parameter that some method has, and for each variant."""
    for key in PARAMETER_FLAGS:
        flags.add_argument(f"--{key.replace('_', '-')}", metavar="X", help=f"a number, {PARAMETERS[key].allowed}")
    for key in SWITCHES:
        flags.add_argument(f"--{key.replace('_', '-')}", choices=("true", "false"))
    for key, values in VARIANTS.items():
        # trim is a share for trimmed means, and a word that says where the threshold counts for others.
        numeric = key in PARAMETERS and PARAMETERS[key].holds is not None
        more: dict[str, Any] = {"metavar": f"X|{'|'.join(values)}"} if numeric else {"choices": values}
        flags.add_argument(f"--{key.replace('_', '-')}", **more)


def add_form_flags(flags: argparse._ActionsContainer) -> None:
    flags.add_argument("--compat", choices=("paper", "mergekit"), help="whose form of the method (YAML: mergekit, else paper)")
    flags.add_argument("--seed", type=int, help="the seed of random masks")
    add_plugins_flag(flags)


def add_plugins_flag(flags: argparse._ActionsContainer) -> None:
    flags.add_argument(
        "--plugins", nargs="+", default=[], metavar="MODULE", help="modules with rules of your own, imported first"
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="default: the number of cores")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="elements that a thread takes at a time")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="also read .bin files (weights only), DCP and DeepSpeed checkpoints"
    )


def merge_verb(options: argparse.Namespace) -> int:
    """Merge by a recipe, or verify a merged model. Returns the exit status."""
    load_plugins(options.plugins, "--plugins")
    chosen = merge_options(options)
    if options.verify is not None:
        for key in ("recipe", "method", "model", "out"):
            if getattr(options, key):
                raise UserError(f"--verify DIR only verifies a model and cannot be combined with {key}")
        from distmerge.merging.record import verify_merged

        print(verify_merged(Path(options.verify)))
        return 0
    if options.out is None:
        raise UserError("distmerge merge needs --out DIR")
    from distmerge.merging.merge import merge_models

    print(merge_models(asked_recipe(options, chosen), Path(options.out), chosen))
    return 0


def diagnose_verb(options: argparse.Namespace) -> int:
    """Diagnose models; print, write and draw what was asked for. Returns the exit status."""
    chosen = DiagnoseOptions(
        options.threads, options.chunk, options.device, options.allow_pickle, tuple(options.files or ()), text_options(options)
    )
    if options.plot is not None:
        require_matplotlib("--plot")
    from distmerge.merging.diagnose import diagnose_models

    with quiet():
        diagnosis = diagnose_models(options.models, options.base, chosen)
    print(json.dumps(diagnosis.as_dict()) if options.json else diagnosis)
    if options.plot:
        from distmerge.merging.plots import draw

        draw(diagnosis, Path(options.plot))
    if options.tensorboard:
        from distmerge.merging.plots import to_tensorboard

        to_tensorboard(diagnosis, Path(options.tensorboard))
    return 0


def sweep_verb(options: argparse.Namespace) -> int:
    """Sweep; print a table, plot, and write the best model with --pick. Returns the exit status."""
    load_plugins(options.plugins, "--plugins")
    chosen = SweepOptions(**vars(merge_options(options)), text=text_options(options))
    if options.plot is not None:
        require_matplotlib("--plot")
    if options.method is None or not options.model:
        raise UserError("distmerge sweep needs --method and --model")
    if not options.skill:
        raise UserError("distmerge sweep needs at least one --skill NAME=GLOB")
    skills = globs_by_skill(options.skill)
    from distmerge.merging.merge import merge_models
    from distmerge.merging.sweep import SOUP, draw_pareto, sweep_recipe

    if options.pick != bool(options.out):
        raise UserError("--pick and --out DIR must be given together: the best model is written to DIR")
    if options.out:
        refuse_existing(Path(options.out))
    recipe = recipe_in_flags(options, chosen)
    grid = None if options.method == SOUP else grid_of(options.grid)
    with quiet():
        result = sweep_recipe(recipe, grid, skills, chosen)
    print(json.dumps(result.as_dict()) if options.json else result)
    if options.plot:
        draw_pareto(result, Path(options.plot))
    if options.pick:
        with quiet() if options.json else contextlib.nullcontext():
            print(merge_models(result.best.recipe, Path(options.out), chosen))
    return 0


def merge_options(options: argparse.Namespace) -> MergeOptions:
    """The options that the flags of a merge give, other than the recipe."""
    return MergeOptions(
        threads=options.threads, chunk=options.chunk, device=options.device, allow_pickle=options.allow_pickle,
        compat=options.compat, seed=options.seed, dtype=options.dtype, out_dtype=options.out_dtype,
        tokenizer=options.tokenizer, shard_size=options.shard_size, stochastic=options.stochastic, report=options.report,
        rank=options.rank,
    )  # fmt: skip


def text_options(options: argparse.Namespace) -> TextOptions:
    return TextOptions(options.sequence_length, options.sequences)


def asked_recipe(options: argparse.Namespace, chosen: MergeOptions) -> Recipe:
    """The recipe from the file, or from the flags."""
    if options.recipe is None:
        if options.method is None or not options.model:
            raise UserError("distmerge merge needs a RECIPE, or --method and --model")
        return recipe_in_flags(options, chosen)
    if given := [key for key in ("method", "base", "general", "model") if getattr(options, key)]:
        raise UserError(f"--{given[0]} belongs to a recipe in flags, but the recipe {options.recipe} is given")
    return recipe_in_file(options.recipe, parameters_of(options), chosen)


def recipe_in_flags(options: argparse.Namespace, chosen: MergeOptions) -> Recipe:
    models = [named(item) for item in options.model]
    return recipe_of(options.method, models, options.base, options.general, parameters_of(options), chosen)


def named(item: str) -> Named:
    """``MODEL`` or ``MODEL:WEIGHT``. If a model with the whole name exists, the colon is part of its name."""
    path, colon, weight = item.rpartition(":")
    if not colon or not path or "/" in weight or Path(item).exists():
        return Named(item)
    return Named(path, weight)


def parameters_of(options: argparse.Namespace) -> dict[str, Setting]:
    """The method's parameters and variants in the flags."""
    keys = dict.fromkeys([*PARAMETER_FLAGS, *VARIANTS])
    found: dict[str, Setting] = {key: getattr(options, key) for key in keys}
    found |= {key: getattr(options, key) == "true" for key in SWITCHES if getattr(options, key) is not None}
    return {key: value for key, value in found.items() if value is not None}


def grid_of(given: str | None) -> tuple[str, list[float]]:
    """``PARAMETER=X,Y`` as the parameter and its values."""
    key, _, values = (given or "").partition("=")
    if not all(map(is_number, values.split(","))):
        raise UserError(f"--grid must be PARAMETER=X,Y,... such as lambda=0.2,0.4, got {given}")
    numbers = [float(value) for value in values.split(",")]
    check_grid(key, numbers)
    return key, numbers


def globs_by_skill(given: list[str]) -> dict[str, list[str]]:
    """``["a=x.txt"]`` as ``{"a": ["x.txt"]}``."""
    found: dict[str, list[str]] = {}
    for item in given:
        name, equals, pattern = item.partition("=")
        if not name or not equals or not pattern:
            raise UserError(f"--skill must be NAME=GLOB, got {item}")
        found.setdefault(name, []).append(pattern)
    return found
