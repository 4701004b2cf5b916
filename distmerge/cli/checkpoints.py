"""The flags of ``window``, ``anneal``, ``recover`` and ``verify``. Heavy imports wait until the flags are known to be sound."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmerge.errors import UserError
from distmerge.plotting import require_matplotlib

if TYPE_CHECKING:
    from distmerge.config.train import TrainConfig

VERBS = ("window", "anneal", "recover", "verify")


def add_parsers(verbs: Any) -> None:
    window = verbs.add_parser("window", help="merge a run's blocks, or other checkpoints of one model", allow_abbrev=False)
    window.add_argument("members", nargs="+", metavar="RUN_DIR | MODEL_DIR", help="a run, or models, oldest first")
    window.add_argument("--out", metavar="DIR", help="the merged model; must not exist")
    window.add_argument("--last", type=int, metavar="N", help="only the newest N")
    window.add_argument("--steps", metavar="A:B", help="only those that end at steps A to B")
    window.add_argument("--curve", default="linear", help="linear, cosine, 1-sqrt, floor:R, mean, wma, ema:A, table:X=D,...")
    window.add_argument("--quadrature", choices=("endpoint", "mean"), default="endpoint", help="how a curve becomes weights")
    window.add_argument("--dtype", choices=("F32", "BF16", "F16"), help="of the output (default: the inputs')")
    window.add_argument("--explain", action="store_true", help="say whether merging should help here, and why")
    window.add_argument("--plot", metavar="FILE", help="draw weights, implied learning rate and frequency response")
    window.add_argument("--allow-pickle", action="store_true", help="read DCP and DeepSpeed checkpoints, which are pickles")
    window.add_argument("--threads", type=int, help="default: the cores of this process")
    window.add_argument("--chunk", type=int, default=1 << 20, help="elements that a thread takes at a time")
    anneal = verbs.add_parser("anneal", help="fork a run and really anneal it; compare with the preview", allow_abbrev=False)
    anneal.add_argument("run_dir", metavar="RUN_DIR")
    anneal.add_argument("--from", dest="step", type=int, required=True, metavar="STEP", help="a checkpoint's step")
    anneal.add_argument("--decay-steps", type=int, required=True, metavar="N")
    anneal.add_argument("--curve", choices=("linear", "cosine", "1-sqrt"), default="linear")
    anneal.add_argument(
        "--calibrate", nargs="+", default=[], metavar="RUN_DIR", help="runs of other seeds whose forks correct the prediction"
    )
    recover = verbs.add_parser("recover", help="go back to stable checkpoints by hand; the next start carries it out")
    recover.add_argument("run_dir", metavar="RUN_DIR")
    recover.add_argument("--before", type=int, metavar="STEP", help="where it went wrong: only checkpoints before it")
    recover.add_argument("--merge-last", type=int, default=3, metavar="N", help="1 is a plain roll-back")
    recover.add_argument("--keep-optimizer", choices=("reset", "average", "rollback"), default="rollback")
    recover.add_argument("--skip-batches", type=int, default=0, metavar="N", help="leave out N batches around --before")
    verify = verbs.add_parser("verify", help="hash again all that a run published, and say what is damaged")
    verify.add_argument("run_dir", metavar="RUN_DIR")


def run(options: argparse.Namespace, train: Callable[[TrainConfig, list[str]], int]) -> int:
    """The verb's exit status. ``train`` launches a run's ranks."""
    for name in ("last", "merge_last", "decay_steps", "threads", "chunk"):
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be >= 1, got {value}")
    match options.verb:
        case "window":
            return window(options)
        case "anneal":
            return anneal(options, train)
        case "recover":
            return recover(options)
    return verify(Path(options.run_dir))


def window(options: argparse.Namespace) -> int:
    if options.out is None and not options.explain and options.plot is None:
        raise UserError("distmerge window needs --out DIR, --explain or --plot FILE")
    if options.plot is not None:
        check_plot(options.plot)
    span = span_of(options.steps)

    from distmerge.windows.merge import merge_window

    merge_window(options, span)
    return 0


def check_plot(path: str) -> None:
    """Refuse a picture that could not be drawn before anything is merged."""
    require_matplotlib("--plot")
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"--plot must be a .svg, .png or .pdf file, got {path}")


def anneal(options: argparse.Namespace, train: Callable[[TrainConfig, list[str]], int]) -> int:
    from distmerge.windows import anneal as room

    run_dir = Path(options.run_dir)
    fork, entry = room.begin(
        run_dir, options.step, options.decay_steps, options.curve, [Path(run) for run in options.calibrate]
    )
    status = train(fork, ["train", str(Path(fork.run_dir) / "config.toml")])
    if status == 0:
        print(room.finish(run_dir, fork, entry))
    return status


def span_of(text: str | None) -> tuple[int, int] | None:
    """``A:B`` as steps; either may be left out."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(part.isdigit() or not part for part in (first, last)):
        raise UserError(f"--steps must be A:B, got {text}")
    return int(first or 0), int(last or 1 << 62)


def recover(options: argparse.Namespace) -> int:
    from distmerge.recovery.manual import recover_by_hand

    if options.skip_batches and options.before is None:
        raise UserError("--skip-batches needs --before STEP, which says where the batches are")
    print(
        recover_by_hand(
            Path(options.run_dir), options.before, options.merge_last, options.keep_optimizer, max(0, options.skip_batches)
        )
    )
    return 0


def verify(run_dir: Path) -> int:
    """Status 1 if anything is damaged."""
    from distmerge.checkpoints.verify import verify_run

    verdicts = verify_run(run_dir)
    for verdict in verdicts:
        print(f"{verdict.path}: {verdict.said}")
    return int(any(verdict.damaged for verdict in verdicts))
