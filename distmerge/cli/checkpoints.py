"""The verbs ``window``, ``anneal``, ``recover`` and ``verify``. Slow imports happen only after the flags have been checked."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distmerge.cli import training
from distmerge.cli.merging import add_form_flags, add_parameter_flags, add_plugins_flag, parameters_of
from distmerge.errors import UserError
from distmerge.merging.options import CHUNK
from distmerge.plotting import check_picture
from distmerge.rules import catalogue
from distmerge.rules.plugins import load_plugins
from distmerge.windows.options import MEAN, WindowOptions, way_of


def add_parsers(verbs: Any) -> None:
    window = verbs.add_parser("window", help="merge a run's blocks, or other checkpoints of one model", allow_abbrev=False)
    window.add_argument("members", nargs="+", metavar="RUN_DIR | MODEL_DIR", help="a run, or models, oldest first")
    window.add_argument("--out", metavar="DIR", help="the merged model; must not exist")
    window.add_argument("--last", type=int, metavar="N", help="only the newest N")
    window.add_argument("--steps", metavar="A:B", help="only those that end at steps A to B, inclusive")
    window.add_argument("--curve", help="linear (default), cosine, 1-sqrt, floor:R, mean, wma, ema:A, table:X=D,...")
    window.add_argument("--quadrature", choices=("endpoint", "mean"), default="endpoint", help="how a curve becomes weights")
    window.add_argument("--dtype", choices=("F32", "BF16", "F16"), help="the output's dtype (default: the inputs')")
    window.add_argument("--explain", action="store_true", help="say whether merging should help here, and why")
    window.add_argument("--plot", metavar="FILE", help="draw weights, implied learning rate and frequency response")
    window.add_argument("--allow-pickle", action="store_true", help="read DCP and DeepSpeed checkpoints, which are pickles")
    window.add_argument("--threads", type=int, help="default: the cores of this process")
    window.add_argument("--chunk", type=int, default=CHUNK, help="elements that a thread takes at a time")
    flags = window.add_argument_group("merging by another rule than a mean weighted by a curve")
    flags.add_argument("--rule", default=MEAN, help=f"one of {', '.join(catalogue.names())}")
    flags.add_argument("--base", metavar="MODEL", help="what task vectors start from (default: the oldest member)")
    add_parameter_flags(flags)
    add_form_flags(flags)
    anneal = verbs.add_parser("anneal", help="fork a run and anneal it; compare with the preview", allow_abbrev=False)
    anneal.add_argument("run_dir", metavar="RUN_DIR")
    anneal.add_argument("--from", dest="step", type=int, required=True, metavar="STEP", help="the checkpoint's step")
    anneal.add_argument("--decay-steps", type=int, required=True, metavar="N", help="steps of the decay")
    anneal.add_argument("--curve", choices=("linear", "cosine", "1-sqrt"), default="linear")
    anneal.add_argument(
        "--calibrate", nargs="+", default=[], metavar="RUN_DIR", help="runs of other seeds; their forks correct the prediction"
    )
    add_plugins_flag(anneal)
    recover = verbs.add_parser("recover", help="manual recovery: plan a roll-back, which the next start carries out")
    recover.add_argument("run_dir", metavar="RUN_DIR")
    recover.add_argument(
        "--before", type=int, metavar="STEP", help="the step where training went wrong: use only earlier checkpoints"
    )
    recover.add_argument(
        "--merge-last", type=int, default=3, metavar="N", help="merge the last N stable checkpoints; 1 is a plain roll-back"
    )
    recover.add_argument(
        "--keep-optimizer", choices=("reset", "average", "rollback"), default="rollback", help="the optimizer's new state"
    )
    recover.add_argument("--skip-batches", type=int, default=0, metavar="N", help="leave out N batches around --before")
    verify = verbs.add_parser("verify", help="hash everything that a run published, and list what is damaged")
    verify.add_argument("run_dir", metavar="RUN_DIR")


def at_least_one(options: argparse.Namespace, *names: str) -> None:
    """Refuse values below 1 of the flags with these names."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be >= 1, got {value}")


def window_verb(options: argparse.Namespace) -> int:
    """Merge, explain or draw a window. Returns the exit status."""
    load_plugins(options.plugins, "--plugins")
    steps = span_of(options.steps)
    chosen = WindowOptions(
        options.threads, options.chunk, allow_pickle=options.allow_pickle, last=options.last, steps=steps, dtype=options.dtype
    )
    if options.out is None and not options.explain and options.plot is None:
        raise UserError("distmerge window needs --out DIR, --explain or --plot FILE")
    if options.plot is not None:
        check_picture("--plot", options.plot)
    way = way_of(
        options.rule, options.curve, options.quadrature, options.base, parameters_of(options), options.compat, options.seed,
        drawn=options.plot is not None,
    )  # fmt: skip
    from distmerge.windows.merge import merge_window

    out, plot = (None if value is None else Path(value) for value in (options.out, options.plot))
    if said := str(merge_window(options.members, way, chosen, out, options.explain, plot)):
        print(said)
    return 0


def anneal_verb(options: argparse.Namespace) -> int:
    """Fork a run and anneal it. Returns the exit status."""
    at_least_one(options, "decay_steps")
    from distmerge.windows.anneal import begin_fork, record_outcome

    run_dir = Path(options.run_dir)
    fork, entry = begin_fork(
        run_dir, options.step, options.decay_steps, options.curve, [Path(run) for run in options.calibrate], options.plugins
    )
    named = ["--plugins", *options.plugins] if options.plugins else []
    status = training.start(fork, fork.mesh.workers, ["train", str(Path(fork.run_dir) / "config.toml"), *named])
    if status == 0:
        print(record_outcome(run_dir, fork, entry))
    return status


def span_of(text: str | None) -> tuple[int, int] | None:
    """The first and last step of ``A:B``, of which either may be left out; None for None."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdigit() or not part for part in (first, last)):
        raise UserError(f"--steps must be A:B, got {text}")
    return int(first or 0), int(last or 1 << 62)


def recover_verb(options: argparse.Namespace) -> int:
    """Plan a manual recovery. Returns the exit status."""
    at_least_one(options, "merge_last")
    from distmerge.recovery.manual import plan_manual_recovery

    if options.skip_batches and options.before is None:
        raise UserError("--skip-batches needs --before STEP, around which the batches lie")
    skip = max(0, options.skip_batches)
    print(plan_manual_recovery(Path(options.run_dir), options.before, options.merge_last, options.keep_optimizer, skip))
    return 0


def verify_verb(options: argparse.Namespace) -> int:
    """Hash everything that a run published. Returns the exit status, 1 if anything is damaged."""
    from distmerge.checkpoints.verify import verify_run

    verdicts = verify_run(Path(options.run_dir))
    for verdict in verdicts:
        print(verdict)
    return int(any(verdict.damaged for verdict in verdicts))
