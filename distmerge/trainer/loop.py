"""Training: open the run, loop over its steps, close it. Each kind of merge is one line of the loop."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from distmerge.config import toml
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.launch.interrupts import REQUEUE
from distmerge.launch.ranks import DIVERGED, Place, launch
from distmerge.mesh import Mesh
from distmerge.rundir.layout import RunDirectory, take_lock, write_atomically
from distmerge.schedule import lr_factor
from distmerge.trainer.ending import close, stop_early
from distmerge.trainer.run import Run


def train(config: TrainConfig, place: Place, command: list[str]) -> None:
    """Train one run to its end, from its newest valid checkpoint if there is one.

    Raises:
        SystemExit: with the run's exit status if the run diverged or was asked to stop early.
    """
    mesh = Mesh(config.mesh, place, config.train.threads)
    run: Run | None = None
    try:
        directory = RunDirectory(config.run_dir)
        lock = take_lock(directory, config, mesh)
        run = Run(config, mesh, directory, command)
        run.resume()
        status = close(run) if loop(run) else stop_early(run)
        lock.release()
        run.preemption.close()
        mesh.close()
        if status:
            raise SystemExit(status)
    except RuntimeError as error:
        raise mesh.explain_lost_ranks(error) from error
    finally:
        if run is not None:
            run.preemption.close()


def train_here(config: TrainConfig, ranks: int) -> None:
    """Train one of several runs, such as those of an experiment: in this process if it has one rank, else as a job of its own.

    Raises:
        UserError: if the run failed; the reason has been printed.
        SystemExit: if the run was interrupted; this has been printed.
    """
    if ranks == 1:
        before = dict(os.environ)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        try:
            train(config, Place(0, 1, 0, 1), sys.argv)
        except SystemExit as end:
            if end.code == DIVERGED:  # the run's own message may be in a log file
                raise UserError(f"the run {config.run_dir} diverged, see its summary.json") from None
            raise
        finally:  # processes started later must not take themselves for ranks of this run
            os.environ.clear()
            os.environ.update(before)
        return
    path = Path(config.run_dir).with_suffix(".toml")
    write_atomically(path, toml.dump(config))
    status = launch(ranks, ["train", str(path)])
    if status == REQUEUE or status > 128:
        raise SystemExit(status)
    if status:
        raise UserError(f"the run {config.run_dir} failed")


def loop(run: Run) -> bool:
    """Train until the last step, or until the stopping rule ends the run.

    Returns:
        False if the job was asked to stop early, else True.
    """
    config, meter, recovery = run.config, run.meter, run.recovery
    run.preemption.begin(run.step)
    if run.step == 0 and run.meter.first_eval is None:
        run.write_line(run.evaluate())
        if recovery.section.enabled:
            run.commit()  # recovery can roll back to it before there is another checkpoint
    while run.step < config.steps and not run.expert.stopped:
        factor = lr_factor(config.schedule, run.step, config.steps) * recovery.lr_factor(run.step) * run.expert.lr_factor
        lr = config.optimizer.lr * factor
        result = run.engine.train_step(run.next_batch(), lr)
        run.claim.take()
        if recovery.needed(run.step + 1, result) and recovery.roll_back(run.step + 1):
            continue  # rolled back before a merge or a window block could include values that are not finite
        run.mesh.watchdog.mark(f"the training of step {run.step + 1}")
        merges = [report for merger in run.mergers if (report := merger.step(result.tokens))]  # across workers
        run.step += 1
        run.log_rule_choices(merges)
        recovery.reset(run.step)
        if run.window is not None:
            run.window.observe(run.step, lr, result.loss, recovery.suspicious)  # across checkpoints
        meter.observe(result, lr, merges)
        evaluating = run.due(config.evaluate.every) and run.step < config.steps
        previewing = config.preview is not None and run.due(config.preview.every)
        found = run.evaluate() if evaluating else None
        if evaluating or previewing or run.due(config.log.every):
            run.write_line(found, run.preview_loss() if previewing else None)
        run.expert.observe(run.step, found and found.loss)  # publishes steps for merging and applies the stopping rule
        if recovery.commits(run.step, run.due(config.checkpoint.every)):
            run.commit()
        run.mesh.watchdog.mark(f"step {run.step}")
        if run.preemption.due(run.step):
            return False
    return True
