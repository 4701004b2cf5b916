"""The flags of ``merge``, ``diagnose`` and ``sweep``. Heavy imports wait until a recipe is known to be sound."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.merging.recipe import SHARD_SIZE, Recipe
from distmerge.plotting import require_matplotlib
from distmerge.rules import catalogue
from distmerge.rules.parameters import PARAMETERS, VARIANTS

PARAMETER_FLAGS = [
    key for key, parameter in PARAMETERS.items() if key != "weight" and parameter.holds is not None and key not in VARIANTS
]
SWITCHES = [key for key, parameter in PARAMETERS.items() if parameter.holds is None and key != "rescale"]


def add_parsers(verbs: Any) -> None:
    merge = verbs.add_parser("merge", help="merge models by a recipe or by flags", allow_abbrev=False)
    merge.add_argument("recipe", nargs="?", metavar="RECIPE.yaml|.toml", help="mergekit's YAML, or distmerge's TOML")
    merge.add_argument("--verify", metavar="DIR", help="hash a merged model again and compare with its merge.json")
    add_output_flags(merge)
    add_recipe_flags(merge)
    add_run_flags(merge)
    diagnose = verbs.add_parser("diagnose", help="how alike models are, and how to merge them", allow_abbrev=False)
    diagnose.add_argument("models", nargs="+", metavar="MODEL")
    diagnose.add_argument("--base", required=True, metavar="MODEL", help="what they were trained from")
    diagnose.add_argument("--json", action="store_true", help="print everything as one JSON object")
    diagnose.add_argument("--plot", metavar="DIR", help="write cosines.png and layers.png")
    diagnose.add_argument("--tensorboard", metavar="DIR", help="write the figures for TensorBoard")
    diagnose.add_argument("--files", nargs="+", metavar="GLOB", help="text on which loss barriers and KL are measured")
    diagnose.add_argument("--sequence-length", type=int, default=128)
    diagnose.add_argument("--sequences", type=int, default=64, help="drawn from each text")
    add_run_flags(diagnose)
    sweep = verbs.add_parser("sweep", help="a merge's parameter over a grid, judged by the loss on skills", allow_abbrev=False)
    sweep.add_argument("--grid", metavar="KEY=X,Y,...", help="the parameter and its values, such as lambda=0.2,0.4,0.8")
    sweep.add_argument(
        "--skill", action="append", metavar="NAME=GLOB", help="text of a skill, again for each; the first: general"
    )
    sweep.add_argument("--pick", action="store_true", help="write the model of the lowest mean loss to --out")
    sweep.add_argument("--json", action="store_true", help="print the points as one JSON object")
    sweep.add_argument("--plot", metavar="DIR", help="write pareto.png: the first skill against the others")
    sweep.add_argument("--sequence-length", type=int, default=128)
    sweep.add_argument("--sequences", type=int, default=64, help="drawn from each text")
    add_output_flags(sweep)
    add_recipe_flags(sweep)
    add_run_flags(sweep)


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", metavar="DIR", help="the merged model; must not exist")
    parser.add_argument("--shard-size", default=SHARD_SIZE, metavar="SIZE", help="largest file of the output, such as 500MB")
    parser.add_argument("--stochastic", type=int, metavar="SEED", help="round to bfloat16 stochastically")
    parser.add_argument("--report", action="store_true", help="diagnose the inputs in the same pass: report.json in DIR")


def add_recipe_flags(parser: argparse.ArgumentParser) -> None:
    flags = parser.add_argument_group("a recipe in flags")
    flags.add_argument(
        "--method",
        help=f"one of {', '.join(catalogue.names())}, or auto (what diagnose recommends), or for LoRA cat, svd, extract",
    )
    flags.add_argument("--base", metavar="MODEL", help="what the others were trained from")
    flags.add_argument("--general", metavar="MODEL", help="ptm: what the skills are added to")
    flags.add_argument("--model", action="append", metavar="MODEL[:WEIGHT]", help="a model, again for each (weight: 1)")
    for key in PARAMETER_FLAGS:
        flags.add_argument(f"--{key.replace('_', '-')}", metavar="X", help=f"a number, {PARAMETERS[key].allowed}")
    for key in SWITCHES:
        flags.add_argument(f"--{key.replace('_', '-')}", choices=("true", "false"))
    for key, values in VARIANTS.items():
        numeric = key in PARAMETERS and PARAMETERS[key].holds is not None  # a share to trim, or where the threshold counts
        more: dict[str, Any] = {"metavar": f"X|{'|'.join(values)}"} if numeric else {"choices": values}
        flags.add_argument(f"--{key.replace('_', '-')}", **more)
    flags.add_argument("--rank", type=int, help="of the adapter that svd and extract make")
    flags.add_argument("--dtype", help="round the inputs to it first")
    flags.add_argument("--out-dtype", help="of the output")
    flags.add_argument("--tokenizer", metavar="SOURCE", help="base, union or a model")
    flags.add_argument("--compat", choices=("paper", "mergekit"), help="whose form of the method (YAML: mergekit, else paper)")
    flags.add_argument("--seed", type=int, help="of random masks")


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="default: the cores of this process")
    parser.add_argument("--chunk", type=int, default=1 << 20, help="elements that a thread takes at a time")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--allow-pickle", action="store_true", help="read .bin files, too (weights only)")


def run(options: argparse.Namespace) -> int:
    """The verb's exit status."""
    for name, value in (("--threads", options.threads), ("--chunk", options.chunk)):
        if value is not None and not 1 <= value <= 1 << 40:
            raise UserError(f"{name} must be >= 1, got {value}")
    if options.verb in ("diagnose", "sweep"):
        check_text_flags(options)
        if options.plot is not None:
            require_matplotlib("--plot")
    if options.verb == "diagnose":
        from distmerge.merging import diagnose as inspect

        return inspect.run(options)
    if options.verb == "sweep":
        if options.method is None or not options.model:
            raise UserError("distmerge sweep needs --method and --model")
        if not options.skill:
            raise UserError("distmerge sweep needs at least one --skill NAME=GLOB")
        skills = globs_by_skill(options.skill)
        from distmerge.merging import sweep

        return sweep.run(table_of(options), skills, options)
    if options.verify is not None:
        for key in ("recipe", "method", "model", "out"):
            if getattr(options, key):
                raise UserError(f"--verify DIR hashes a model again and makes none, got {key}, too")
        from distmerge.merging.record import verify

        print(verify(Path(options.verify)))
        return 0
    if options.out is None:
        raise UserError("distmerge merge needs --out DIR")
    from distmerge.merging.merge import merge

    merge(recipe_of(options), Path(options.out), options)
    return 0


def check_text_flags(options: argparse.Namespace) -> None:
    """Refuse lengths of text that nothing can be measured on."""
    for name, value, least in (("--sequence-length", options.sequence_length, 2), ("--sequences", options.sequences, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} must be >= {least}, got {value}")


def recipe_of(options: argparse.Namespace) -> Recipe:
    """The recipe in the file, or in the flags."""
    given = [key for key in ("method", "base", "general", "model") if getattr(options, key)]
    if options.recipe is None:
        if options.method is None or not options.model:
            raise UserError("distmerge merge needs a RECIPE, or --method and --model")
        from distmerge.merging import recipe_toml

        return recipe_toml.from_table(table_of(options), "")
    if given:
        raise UserError(f"--{given[0]} belongs to a recipe in flags, got the recipe {options.recipe}, too")
    return with_overrides(read(options.recipe), options)


def read(path: str) -> Recipe:
    """The recipe in a file; its suffix gives the notation."""
    if not path.endswith((".yaml", ".yml", ".toml")):
        raise UserError(f"a recipe must be a .yaml, .yml or .toml file, got {path}")
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read((1 << 20) + 1)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}") from None
    if len(text) > 1 << 20:
        raise UserError(f"a recipe must have at most {1 << 20} characters, {path} has more")
    from distmerge.merging import recipe_mergekit, recipe_toml

    return recipe_toml.parse(text) if path.endswith(".toml") else recipe_mergekit.parse(text)


def with_overrides(recipe: Recipe, options: argparse.Namespace) -> Recipe:
    """What flags may change of a recipe in a file: compat, seed, dtypes and variants; nothing else."""
    from dataclasses import replace

    from distmerge.merging.recipe import check_dtype

    for key in [*PARAMETER_FLAGS, *SWITCHES, "tokenizer"]:
        if getattr(options, key) is not None:
            raise UserError(f"--{key.replace('_', '-')} belongs to a recipe in flags; write it into {options.recipe}")
    chosen = {key: getattr(options, key) for key in VARIANTS if getattr(options, key) is not None}
    if "trim" in chosen and chosen["trim"] not in VARIANTS["trim"]:
        raise UserError(f"--trim {chosen['trim']} belongs to a recipe in flags; write it into {options.recipe}")
    return replace(
        recipe,
        variants=recipe.variants | chosen,
        compat=options.compat or recipe.compat,
        seed=recipe.seed if options.seed is None else options.seed,
        dtype=check_dtype("--dtype", options.dtype) or recipe.dtype,
        out_dtype=check_dtype("--out-dtype", options.out_dtype) or recipe.out_dtype,
    )


def globs_by_skill(given: list[str]) -> dict[str, list[str]]:
    """``["a=x.txt"]`` as ``{"a": ["x.txt"]}``."""
    found: dict[str, list[str]] = {}
    for item in given:
        name, equals, pattern = item.partition("=")
        if not name or not equals or not pattern:
            raise UserError(f"--skill must be NAME=GLOB, got {item}")
        found.setdefault(name, []).append(pattern)
    return found


def table_of(options: argparse.Namespace) -> dict[str, Any]:
    """The flags as a table of the TOML notation."""
    table: dict[str, Any] = {key: getattr(options, key) for key in ("method", "base", "general", "compat", "seed")}
    table |= {key: getattr(options, key) for key in ("dtype", "out_dtype", "tokenizer", *PARAMETER_FLAGS, *VARIANTS)}
    table |= {key: getattr(options, key) == "true" for key in SWITCHES if getattr(options, key) is not None}
    known = catalogue.canonical(options.method) in catalogue.names()
    own = catalogue.entry(options.method).parameters if known else ("weight",)
    factor = "omega" if "omega" in own else "weight"
    table["model"] = []
    for item in options.model:
        path, colon, weight = item.rpartition(":")
        if not colon or not path or "/" in weight or Path(item).exists():
            path, weight = item, "1" if factor == "weight" else None
        takes = factor in own and weight is not None
        if weight not in ("1", None) and not takes:
            raise UserError(f"{options.method} takes no weights, got --model {item}")
        table["model"].append({"path": path} | ({factor: weight} if takes else {}))
    return {key: value for key, value in table.items() if value is not None}
