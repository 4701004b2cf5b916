"""The end of a run. A run that is asked to stop early keeps its state for a restart; a run that has completed its steps checks
whether its model has diverged, publishes the model and reports the results."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmerge.engine.health import health_problem
from distmerge.evaluate import Evaluation
from distmerge.files.atomic import delete, write_atomically
from distmerge.files.directories import guarded, publish_directory
from distmerge.launch.interrupts import REQUEUE
from distmerge.launch.ranks import DIVERGED, STOP_REPORTED
from distmerge.mesh import Mesh
from distmerge.rundir.layout import RunDirectory
from distmerge.theta.flat import FlatParameters
from distmerge.trainer.metrics import table

if TYPE_CHECKING:
    from distmerge.trainer.run import Run

NOISE = 0.01
"""Tolerance for the final loss, as a share of the first loss and at least that many nats. A run that has learned nothing ends
slightly above or below its first loss, which must not count as divergence."""


def divergence(flat: FlatParameters, mesh: Mesh, first_loss: float | None, loss: float) -> str | None:
    """Why the model counts as diverged, as a phrase, or None if it does not. A collective over all ranks.

    Args:
        first_loss: loss of the evaluation before the first step, in nats per token. None skips the comparison.
        loss: loss of the model in its present state, in nats per token.
    """
    if (problem := health_problem(flat, mesh)) is not None:
        return problem
    if not math.isfinite(loss):
        return "its evaluation loss is not finite"
    if first_loss is not None and loss > first_loss + NOISE * max(1.0, first_loss):
        return f"its evaluation loss is {loss:.3f}, above the {first_loss:.3f} before the first step"
    return None


def publish_end(directory: RunDirectory, about: dict[str, Any], summary: dict[str, Any], save: Callable[[Path], None]) -> None:
    """Publish the model, then the summary that describes it, and print the result.

    A diverged model is published as ``final.diverged``; a ``final`` that an earlier start of the run has published stays.

    Args:
        about: entries about the run for the model's manifest.
        summary: contents of summary.json. ``diverged`` is None, or the reason why the model counts as diverged.
        save: writes the model into the given directory.
    """
    diverged = summary.get("diverged")
    place = directory.diverged if diverged else directory.final
    publish_directory(place, about | {"steps": summary["steps"]}, save)
    written = json.dumps({key: finite(value) for key, value in summary.items()}, indent=2, allow_nan=False) + "\n"
    guarded(directory.summary, lambda: write_atomically(directory.summary, written))
    if diverged:
        print(f"error: {directory.divergence_message(diverged)}", file=sys.stderr, flush=True)
        return
    guarded(directory.diverged, lambda: delete(directory.diverged))
    print(table(directory, summary), flush=True)


def finite(value: Any) -> Any:
    """The value, or None in place of NaN and infinity, which JSON cannot represent."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def stop_early(run: Run) -> int:
    """Commit the state for a restart.

    Returns:
        the exit status.
    """
    kept = run.committed == run.step or run.commit()
    run.store.wait()
    if run.log is not None:
        state = f"checkpoint of step {run.step} committed" if kept else f"step {run.step} not committed, its state is unhealthy"
        requeue = f", exit status {REQUEUE} asks for a requeue" if run.preemption.status == REQUEUE else ""
        run.log.say(f"stopped early: {state}{requeue}; start the same command again to resume")
        run.log.close()
        run.mesh.board.ask(lambda store: store.set(STOP_REPORTED, "1"), run.mesh.timeout_seconds)
    run.preemption.notify_agent()
    run.engine.close()
    return run.preemption.status


def close(run: Run) -> int:
    """Commit the last state, complete the merges, publish the model and report the results.

    Returns:
        the exit status.
    """
    run.claim.take()
    if run.committed != run.step:
        run.commit()
    run.store.wait()
    run.recovery.before_the_end(run.step)
    run.preemption.end()
    for merger in run.mergers:
        merger.finish()
    for merger in run.mergers:  # resets the anchors to the final parameters, so that the evaluated model is the published one
        merger.restart()
    step = run.expert.finish()
    found = run.evaluate()
    run.write_line(found)
    # With stopping.rule "merged" the loss of the merge decides which step is kept; the model's own loss may have risen.
    first = run.meter.first_eval if run.expert.peak is None else None
    diverged = divergence(run.engine.parameters, run.mesh, first, found.loss)
    whole = run.engine.whole_state()
    with run.mesh.raise_on_all_ranks():
        if run.log is not None:
            run.log.close()
            about, summary = run.claim.manifest_entries() | {"step": step}, summary_of(run, found) | {"diverged": diverged}
            publish_end(run.directory, about, summary, lambda place: run.expert.save(place, step, whole))
    run.engine.close()
    return 0 if diverged is None else DIVERGED


def summary_of(run: Run, found: Evaluation) -> dict[str, Any]:
    """The contents of summary.json.

    Args:
        found: the run's last evaluation.
    """
    numel, ranks, tokens = run.engine.parameters.numel, run.mesh.world, run.step * run.tokens_per_step
    return {
        "steps": run.step,
        "stopped": run.expert.stopped,
        "workers": run.mesh.workers,
        "ranks": ranks,
        "parameters": numel,
        "eval_loss_first": run.meter.first_eval,
        "eval_loss_last": found.loss,
        "eval_loss_last_se": found.standard_error,
        "tokens": tokens,
        "tokens_per_second": tokens / run.meter.seconds,
        "bytes_sent": run.bytes_sent,
        "bytes_sent_by_data_parallelism": run.step * 4 * numel * 2 * (ranks - 1) / ranks,
    }
