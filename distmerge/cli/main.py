"""The command line. Slow imports are inside the verbs, so that help and errors appear at once."""

from __future__ import annotations

import argparse
import errno
import gc
import json
import os
import sys
import traceback
from typing import NoReturn

from distmerge.cli import checkpoints, experts, merging, training
from distmerge.errors import UserError
from distmerge.launch.interrupts import SIGNAL_THREAD
from distmerge.merging.options import check_text
from distmerge.quiet import quiet

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)

OUT_OF_MEMORY = "out of memory: allow the process more (ulimit -v, the container's limit), or make it do less at once"
MEMORY_SIGNS = ("can't allocate memory", "not enough memory", "bad_alloc", "can't start new thread", "failed to map segment")
"""Parts of the messages of torch, C++, Python's threads and the linker when memory runs out."""


def program() -> None:
    """The command: the process ends with it."""
    SIGNAL_THREAD.install()
    gc.set_threshold(50_000, 20, 20)  # imports make no garbage, and looking for it is a tenth of their time
    if "RANK" in os.environ:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # errors of sockets are reported in one line of our own
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
    """Run the verb in ``sys.argv`` and exit with its status. Errors that the user can fix are printed in one line."""
    try:
        try:
            status = run(sys.argv[1:])
        finally:
            sys.stdout.flush()
        sys.exit(status)
    except UserError as error:
        fail(str(error))
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # at its end the process still flushes Python's buffer
        fail("standard output was closed before everything was written")
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
    """End the process without finalising the interpreter; everything that was written is durable.

    Finalising takes half a second of a merge. In a rank, threads of torch and Arrow that need the interpreter meanwhile
    sometimes abort the process ("terminate called without an active exception"), and a finished job would count as failed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def fail(message: str) -> None:
    """Print an error in one line and exit with status 2."""
    print("error: " + " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """Reports errors in one line, like all other errors of the command."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class Version(argparse.Action):
    """Prints the version and exits. The version is looked up only then, since reading the package's metadata is slow."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        from distmerge.version import installed_version

        print(f"{parser.prog} {installed_version()}")
        sys.exit(0)


def command_line() -> Parser:
    """The parser of the whole command line."""
    parser = Parser(
        prog="distmerge", description="Training in which merging is an event: across workers, checkpoints and experts."
    )
    parser.add_argument("--version", action=Version, nargs=0, help="print the version and exit")
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it here,
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    train = verbs.add_parser("train", help="train a run, or resume it", add_help=False, allow_abbrev=False)
    train.add_argument("config", nargs="?", metavar="CONFIG.toml")
    train.add_argument("--ranks", type=int, help="ranks to launch on this machine (default: mesh.workers)")
    train.add_argument(
        "--restart", action="store_true", help="start from scratch; what is in run_dir is moved to RUN_DIR.old-N"
    )
    train.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # or here, after the verb
    train.add_argument("-h", "--help", action="store_true")
    evaluate = verbs.add_parser("eval", help="measure the loss of a model directory on text", allow_abbrev=False)
    evaluate.add_argument("model", metavar="MODEL_DIR")
    evaluate.add_argument("--files", nargs="+", metavar="GLOB", help="text files (default: what its run held out)")
    evaluate.add_argument("--sequence-length", type=int, help="tokens per sequence (default: its run's, or 128 with --files)")
    evaluate.add_argument("--sequences", type=int, default=256, help="sequences drawn from the text (default: 256)")
    verbs.add_parser("build-ops", help="compile DeepSpeed's operators, once, in one process", allow_abbrev=False)
    merging.add_parsers(verbs)
    checkpoints.add_parsers(verbs)
    experts.add_parsers(verbs)
    return parser


def run(arguments: list[str]) -> int:
    """Run the verb in ``arguments``. Returns the exit status.

    Raises:
        UserError: for anything that the user can fix.
    """
    options, overrides = command_line().parse_known_args(arguments)
    if options.verb == "train":
        return training.train_verb(options, overrides, arguments)
    if options.verb == "experts":
        return training.experts_verb(options, overrides, arguments)
    if overrides and overrides[0].partition("=")[0] == "--batches":
        raise UserError("--batches is now --sequences, which are drawn from the whole text: give 8 for each batch")
    if overrides:
        raise UserError(f"unknown argument {overrides[0]}; distmerge {options.verb} --help lists them")
    match options.verb:
        case "merge":
            return merging.merge_verb(options)
        case "diagnose":
            return merging.diagnose_verb(options)
        case "sweep":
            return merging.sweep_verb(options)
        case "eval":
            return eval_verb(options)
        case "examples":
            return experts.examples_verb(options)
        case "ptm":
            return experts.ptm_verb(options)
        case "build-ops":
            from distmerge.engine import ops

            ops.main()
            return 0
        case "window":
            return checkpoints.window_verb(options)
        case "anneal":
            return checkpoints.anneal_verb(options)
        case "recover":
            return checkpoints.recover_verb(options)
        case _:
            return checkpoints.verify_verb(options)


def eval_verb(options: argparse.Namespace) -> int:
    """Measure a model's loss and print it as JSON. Returns the exit status."""
    check_text(options.sequence_length, options.sequences)
    if not os.path.isdir(options.model):
        raise UserError(f"MODEL_DIR must be a directory, got {options.model}")
    with quiet():
        from distmerge.evaluate import evaluate_directory

        result = evaluate_directory(options.model, options.files, options.sequence_length, options.sequences)
    print(json.dumps(result.as_dict()))
    return 0
