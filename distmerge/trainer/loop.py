"""Training: open the run, the loop, close. Every merge is a line of the loop."""

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
from distmerge.trainer.ending import close, leave
from distmerge.trainer.run import Run


def train(config: TrainConfig, place: Place, command: list[str]) -> None:
    """Train one run to its end, from its beginning or from its newest valid checkpoint."""
    mesh = Mesh(config.mesh, place, config.train.threads)
    run: Run | None = None
    try:
        directory = RunDirectory(config.run_dir)
        lock = take_lock(directory, config, mesh)
        run = Run(config, mesh, directory, command)
        run.resume()
        status = close(run) if loop(run) else leave(run)
        lock.release()
        run.preemption.close()
        mesh.close()
        if status:
            raise SystemExit(status)
    except RuntimeError as error:
        raise mesh.name_dead_peers(error) from error
    finally:
        if run is not None:
            run.preemption.close()


def train_here(config: TrainConfig, ranks: int) -> None:
    """Train one run of many, such as an experiment's: in this process, or with several ranks as a job of its own.

    Raises:
        UserError: when the job failed; it has said why.
        SystemExit: when it was interrupted; it has said so.
    """
    if ranks == 1:
        before = dict(os.environ)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
        try:
            train(config, Place(0, 1, 0, 1), sys.argv)
        except SystemExit as end:
            if end.code == DIVERGED:  # its line may lie in a log
                raise UserError(f"the run {config.run_dir} diverged, see its summary.json") from None
            raise
        finally:  # what is started from here later is no rank
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
    """Train to the end: True. False where the job was told to leave before it."""
    config, meter, recovery = run.config, run.meter, run.recovery
    run.preemption.begin(run.step)
    if run.step == 0 and run.meter.first_eval is None:
        run.write_line(run.evaluate())
        if recovery.section.enabled:
            run.commit()  # to go back to before the first checkpoint
    while run.step < config.steps and not run.expert.stopped:
        factor = lr_factor(config.schedule, run.step, config.steps) * recovery.lr_factor(run.step) * run.expert.lr_factor
        lr = config.optimizer.lr * factor
        result = run.engine.train_step(run.next_batch(), lr)
        run.claim.take()
        if recovery.needed(run.step + 1, result) and recovery.roll_back(run.step + 1):
            continue  # before a merge or a block could take in values that are not finite
        run.mesh.watchdog.mark(f"the training of step {run.step + 1}")
        merges = [report for merger in run.mergers if (report := merger.step(result.tokens))]  # across workers
        run.step += 1
        run.tell_choices(merges)
        recovery.reset(run.step)
        if run.window is not None:
            run.window.observe(run.step, lr, result.loss, recovery.suspicious)  # across checkpoints
        meter.observe(result, lr, merges)
        evaluating = run.due(config.evaluate.every) and run.step < config.steps
        previewing = config.preview is not None and run.due(config.preview.every)
        found = run.evaluate() if evaluating else None
        if evaluating or previewing or run.due(config.log.every):
            run.write_line(found, run.preview_loss() if previewing else None)
        run.expert.observe(run.step, found and found.loss)  # publishes steps to be merged, stops where the rule says so
        if recovery.commits(run.step, run.due(config.checkpoint.every)):
            run.commit()
        run.mesh.watchdog.mark(f"step {run.step}")
        if run.preemption.due(run.step):
            return False
    return True
