"""Starts the ranks of ``train``, ``experts`` and ``anneal`` on this machine, or runs this process as one of them.

Slow imports are inside the functions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from distmerge.errors import UserError
from distmerge.launch.ranks import DIVERGED

if TYPE_CHECKING:
    from distmerge.config.train import TrainConfig


def train_one(config: TrainConfig, ranks: int) -> None:
    """Train one run of an experiment to its end."""
    from distmerge.trainer.loop import train_here

    train_here(config, ranks)


def train_verb(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    """Train: under a launcher this process is a rank, otherwise it launches the ranks. Returns the exit status.

    Args:
        overrides: ``--section.key value``.
        arguments: of the whole command, for the ranks.
    """
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
                "--restart cannot be used under a launcher, which would start from scratch each time it restarts its job; "
                f"move {config.run_dir} away by hand"
            )
        train(config, here, ["distmerge", *arguments])
        return 0
    ranks = config.mesh.workers if options.ranks is None else options.ranks
    if options.restart:
        begin_anew(config, ranks)
        arguments = [argument for argument in arguments if argument != "--restart"]
    return start(config, ranks, arguments)


def begin_anew(config: TrainConfig, ranks: int) -> None:
    """Move an old run aside, after all checks of the new one that are possible before it starts."""
    from distmerge.data.sources import check_sources
    from distmerge.rundir import layout

    check_ranks(config, ranks)
    check_sources(config)
    if (aside := layout.begin_anew(layout.RunDirectory(config.run_dir))) is not None:
        print(f"the run in {config.run_dir} was moved to {aside}; starting from scratch", file=sys.stderr)


def check_ranks(config: TrainConfig, ranks: int) -> None:
    if ranks < 1 or ranks % config.mesh.workers:
        raise UserError(f"--ranks must be a multiple of config.mesh.workers = {config.mesh.workers}, got {ranks}")


def start(config: TrainConfig, ranks: int, arguments: list[str]) -> int:
    """Run all checks that are possible before training, then launch the ranks. Returns the exit status.

    A run that is finished is not launched; its results are printed.
    """
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
            print(f"error: {directory.divergence_message(summary['diverged'])}", file=sys.stderr)
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
    """Train several experts: this process is a rank of their job, or launches one job, or one job after another. Returns the
    exit status."""
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
                if end.code != DIVERGED:  # divergence ends this expert only; its siblings go on
                    raise
        return 0
    if here is not None:
        raise UserError('mode must be "side-by-side" under a launcher; with "in-turn" distmerge launches each expert itself')
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


def prepare_deepspeed(config: TrainConfig) -> None:
    """Check that DeepSpeed is installed, and compile the operators that it needs, in a process of its own, before any rank
    starts.

    Raises:
        UserError: when it is not installed.
    """
    from importlib.util import find_spec

    if find_spec("deepspeed") is None:
        raise UserError('config.engine.kind "deepspeed" needs DeepSpeed: pip install distmerge[deepspeed]')
    if config.engine.offloads:
        subprocess.run([sys.executable, "-m", "distmerge", "build-ops"], check=True, stdout=subprocess.DEVNULL)


def train_help() -> int:
    """Print every key of the configuration with its default and meaning. Returns the exit status."""
    import tyro

    from distmerge.config.train import TrainConfig

    print("usage: distmerge train CONFIG.toml [--ranks N] [--restart] [--section.key value ...]\n")
    print("Any key of the configuration can be given after the file; --merge.0.every is a key of the first [[merge]].")
    print("--restart starts from scratch, and moves what is in run_dir to RUN_DIR.old-N.\n")
    tyro.cli(TrainConfig, prog="distmerge train CONFIG.toml", args=["--help"], config=(tyro.conf.AvoidSubcommands,))
    return 0
