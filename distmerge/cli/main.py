"""The command line. Heavy imports are inside the verbs, so that help and mistakes are answered at once."""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from distmerge.cli import checkpoints
from distmerge.cli import experts as skills
from distmerge.cli import merging as experts
from distmerge.errors import UserError
from distmerge.launch.interrupts import EARS
from distmerge.launch.ranks import DIVERGED
from distmerge.quiet import quiet

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

OUT_OF_MEMORY = "out of memory: allow the process more (ulimit -v, the container's limit), or give it less to do at once"
MEMORY_SIGNS = ("can't allocate memory", "not enough memory", "bad_alloc", "can't start new thread", "failed to map segment")
"""In what torch, C++, Python's threads and the linker say when there is no more."""


def program() -> None:
    """The command: the process ends with it."""
    EARS.install()
    gc.set_threshold(50_000, 20, 20)  # imports make no garbage, and looking for it is a tenth of their time
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # what torch's sockets warn of is told in a line
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int) and (sys.argv[1:2] == ["merge"] or "RANK" in os.environ):
            leave(end.code)
        raise
    except Exception:
        if "RANK" not in os.environ:
            raise
        traceback.print_exc()
        leave(1)


def main() -> None:
    try:
        try:
            status = run(sys.argv[1:])
        finally:
            sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is still in Python's buffer goes there when the process ends
        fail("standard output was closed before all was written")
    except MemoryError:
        fail(OUT_OF_MEMORY)
    except OSError as error:
        if error.errno == errno.ENOMEM:
            fail(OUT_OF_MEMORY)
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"cannot write {error.filename or 'to the disk'}: {error.strerror}")
    except (RuntimeError, ImportError) as error:
        if not any(sign in str(error) for sign in MEMORY_SIGNS):
            raise
        fail(OUT_OF_MEMORY)


def leave(status: int) -> NoReturn:
    """End without tearing torch down: all that was written is durable.

    It takes half a second of a merge. In a rank, threads of torch and Arrow that want the interpreter while it ends abort the
    process now and then ("terminate called without an active exception"): a job that is done would have failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def fail(message: str) -> None:
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as all other errors are said."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help says more")


def run(arguments: list[str]) -> int:
    parser = Parser(
        prog="distmerge", description="Training in which merging is an event: across workers, checkpoints and experts."
    )
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it, here or
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    train = verbs.add_parser("train", help="train a run, or resume it", add_help=False, allow_abbrev=False)
    train.add_argument("config", nargs="?", metavar="CONFIG.toml")
    train.add_argument("--ranks", type=int, help="ranks to launch on this machine (default: mesh.workers)")
    train.add_argument("--restart", action="store_true", help="begin anew; what is in run_dir is moved to RUN_DIR.old-N")
    train.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # after the verb
    train.add_argument("-h", "--help", action="store_true")
    evaluate = verbs.add_parser("eval", help="the loss of a model directory on text", allow_abbrev=False)
    evaluate.add_argument("model", metavar="MODEL_DIR")
    evaluate.add_argument("--files", nargs="+", metavar="GLOB", help="text files (default: what its run held out)")
    evaluate.add_argument("--sequence-length", type=int, help="tokens (default: 128, or as in its run without --files)")
    evaluate.add_argument("--sequences", type=int, default=256, help="drawn from all of the text (default: 256)")
    verbs.add_parser("build-ops", help="compile what DeepSpeed needs, once, in one process", allow_abbrev=False)
    experts.add_parsers(verbs)
    checkpoints.add_parsers(verbs)
    skills.add_parsers(verbs)
    options, overrides = parser.parse_known_args(arguments)
    if options.verb == "train":
        return train_verb(options, overrides, arguments)
    if options.verb == "experts":
        return experts_verb(options, overrides, arguments)
    if overrides and overrides[0].partition("=")[0] == "--batches":
        raise UserError("--batches is now --sequences, which are drawn from all of the text: 8 for each batch")
    if overrides:
        raise UserError(f"unknown argument {overrides[0]}; distmerge {options.verb} --help lists them")
    if options.verb in ("merge", "diagnose", "sweep"):
        return experts.run(options)
    if options.verb == "eval":
        return eval_verb(options)
    if options.verb in skills.VERBS:
        return skills.run(options, train_one)
    if options.verb == "build-ops":
        from distmerge.engine import ops

        ops.main()
        return 0
    return checkpoints.run(options, lambda config, command: start(config, config.mesh.workers, command))


def train_one(config, ranks: int) -> None:
    """One run of an experiment, to its end."""
    from distmerge.trainer.loop import train_here

    train_here(config, ranks)


def train_verb(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    from distmerge.config import toml
    from distmerge.launch import ranks as launch

    if options.help:
        return train_help()
    if options.config is None or options.config.startswith("--"):
        raise UserError("distmerge train needs a CONFIG.toml, such as configs/quickstart.toml")
    here = launch.place()
    if here is not None:
        launch.die_with_parent()
    config = toml.read(options.config, overrides)
    if here is not None:
        from distmerge.trainer.loop import train

        if options.restart:
            raise UserError(
                "--restart is for distmerge train started alone: a launcher that starts its job again would begin anew each "
                f"time; move {config.run_dir} away by hand"
            )
        train(config, here, ["distmerge", *arguments])
        return 0
    ranks = config.mesh.workers if options.ranks is None else options.ranks
    if options.restart:
        begin_anew(config, ranks)
        arguments = [argument for argument in arguments if argument != "--restart"]
    return start(config, ranks, arguments)


def begin_anew(config, ranks: int) -> None:
    """Move an old run aside, once it is known that the new one can start as far as can be known here."""
    from distmerge.data.sources import check_sources
    from distmerge.rundir import layout

    check_ranks(config, ranks)
    check_sources(config)
    if (aside := layout.begin_anew(layout.RunDirectory(config.run_dir))) is not None:
        print(f"the run in {config.run_dir} is moved to {aside}; beginning anew", file=sys.stderr)


def check_ranks(config, ranks: int) -> None:
    if ranks < 1 or ranks % config.mesh.workers:
        raise UserError(f"--ranks must be a multiple of config.mesh.workers = {config.mesh.workers}, got {ranks}")


def start(config, ranks: int, arguments: list[str]) -> int:
    """Refuse what can be known to fail, then launch the ranks."""
    from distmerge.data.sources import check_sources
    from distmerge.launch.ranks import launch
    from distmerge.rundir.layout import Lock, RunDirectory

    check_ranks(config, ranks)
    directory = RunDirectory(config.run_dir)
    directory.check(config)
    lock = Lock(directory)
    lock.take_job()
    lock.release()
    summary = directory.finished(config.steps)
    if summary is not None:
        if summary.get("diverged"):
            print(f"error: {directory.told_of_divergence(summary['diverged'])}", file=sys.stderr)
            return DIVERGED
        from distmerge.trainer.metrics import table

        print(f"{directory.path} has finished its {summary['steps']} steps")
        print(table(directory, summary))
        return 0
    check_sources(config)
    if config.engine.kind == "deepspeed":
        prepare_deepspeed(config)
    return launch(ranks, arguments)


def experts_verb(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    """Several experts: this process is a rank of their job, or launches one, or one after another."""
    from distmerge.config import toml
    from distmerge.data.sources import check_sources
    from distmerge.experts import group
    from distmerge.launch import ranks as launch
    from distmerge.rundir.layout import RunDirectory, write_atomically

    here = launch.place()
    if here is not None:
        launch.die_with_parent()
    plan = group.read(options.config, overrides)
    if options.dry_run:
        from distmerge.experts.dry_run import describe

        print(describe(plan))
        return 0
    if here is not None and plan.mode == "side-by-side":
        from distmerge.trainer.loop import train

        run, place = plan.place_of(here)
        if RunDirectory(run.run_dir).finished(run.steps) is None:
            try:
                train(run, place, ["distmerge", *arguments])
            except SystemExit as end:
                if end.code != DIVERGED:  # that ends this expert alone; its siblings go on
                    raise
        return 0
    if here is not None:
        raise UserError('mode must be "side-by-side" under a launcher; in turn, each expert is a job that distmerge launches')
    for run in plan.runs:
        check_sources(run)
        RunDirectory(run.run_dir).check(run)
    if plan.mode == "side-by-side" and any(RunDirectory(run.run_dir).finished(run.steps) is None for run in plan.runs):
        status = launch.launch(sum(plan.ranks), arguments)
        ends = [RunDirectory(run.run_dir).finished(run.steps) for run in plan.runs]
        return status or (DIVERGED if any(end and end.get("diverged") for end in ends) else 0)
    for run, ranks in zip(plan.runs, plan.ranks, strict=True):
        path = f"{run.run_dir}.toml"
        write_atomically(Path(path), toml.dump(run))
        if status := start(run, ranks, ["train", path]):
            return status
    return 0


def prepare_deepspeed(config) -> None:
    """Refuse a run whose engine is not installed, and compile what it needs in a process of its own, before any rank."""
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise UserError('config.engine.kind "deepspeed" needs DeepSpeed: pip install distmerge[deepspeed]')
    if config.engine.offloads:
        subprocess.run([sys.executable, "-m", "distmerge", "build-ops"], check=True, stdout=subprocess.DEVNULL)


def train_help() -> int:
    """Every key of the configuration, its default and what it does."""
    import tyro

    from distmerge.config.train import TrainConfig

    print("usage: distmerge train CONFIG.toml [--ranks N] [--restart] [--section.key value ...]\n")
    print("Any key of the configuration can be given after the file; --merge.0.every is the first [[merge]]'s.")
    print("--restart begins anew, and moves what is in run_dir to RUN_DIR.old-N.\n")
    tyro.cli(TrainConfig, prog="distmerge train CONFIG.toml", args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    return 0


def eval_verb(options: argparse.Namespace) -> int:
    experts.check_text_flags(options)
    if not os.path.isdir(options.model):
        raise UserError(f"MODEL_DIR must be a directory, got {options.model}")
    with quiet():
        from distmerge.evaluate import evaluate_directory

        result = evaluate_directory(options.model, options.files, options.sequence_length, options.sequences)
    print(json.dumps(result))
    return 0
