"""The end of a run: it leaves, to be started again; or what came out is judged, published by a fitting name, and told."""

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
from distmerge.launch.ranks import DIVERGED, LEFT
from distmerge.mesh import Mesh
from distmerge.rundir.layout import RunDirectory
from distmerge.theta.flat import FlatParameters
from distmerge.trainer.metrics import table

if TYPE_CHECKING:
    from distmerge.trainer.run import Run

NOISE = 0.01
"""A run that has learned nothing ends a little above or below the loss that it began with, which is no divergence: a hundredth
of it, and of a nat at least."""


def divergence(flat: FlatParameters, mesh: Mesh, first_loss: float | None, loss: float) -> str | None:
    """Why the model is no result, in words, or None; a collective.

    Args:
        first_loss: the evaluation before the first step.
        loss: the evaluation of the model as it stands.
    """
    if (problem := health_problem(flat, mesh)) is not None:
        return problem
    if not math.isfinite(loss):
        return "its evaluation loss is not finite"
    if first_loss is not None and loss > first_loss + NOISE * max(1.0, first_loss):
        return f"its evaluation loss is {loss:.3f}, above the {first_loss:.3f} that it began with"
    return None


def publish_end(directory: RunDirectory, about: dict[str, Any], summary: dict[str, Any], save: Callable[[Path], None]) -> None:
    """Publish the model, then the summary that speaks of it; then tell it.

    A model that is no result lies in ``final.diverged``, beside the ``final`` of an earlier end, if there is one.

    Args:
        about: what the model's manifest says of the run.
        summary: with a reason as ``diverged`` where the model is no result.
        save: fills a model directory.
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
    """The value; None where it is a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def leave(run: Run) -> int:
    """Keep the state for whoever starts the run again; the exit status that asks for it."""
    kept = run.committed == run.step or run.commit()
    run.store.wait()
    if run.log is not None:
        state = (
            f"checkpoint of step {run.step} committed" if kept else f"the state of step {run.step} is not sound and not kept"
        )
        asks = f", status {REQUEUE} asks for a requeue" if run.preemption.status == REQUEUE else ""
        run.log.say(f"told to leave: {state}{asks}; start the same command again to resume")
        run.log.close()
        run.mesh.board.ask(lambda store: store.set(LEFT, "1"), run.mesh.timeout_seconds)
    run.preemption.tell_agent()
    run.engine.close()
    return run.preemption.status


def close(run: Run) -> int:
    """Keep the last state, merge what is left to merge, publish the model, and say what came out; the exit status."""
    run.claim.take()
    if run.committed != run.step:
        run.commit()
    run.store.wait()
    run.recovery.before_the_end(run.step)
    run.preemption.end()
    for merger in run.mergers:
        merger.finish()
    for merger in run.mergers:  # what is evaluated is what is published, whichever of several came last
        merger.restart()
    step = run.expert.finish()
    found = run.evaluate()
    run.write_line(found)
    # Where a merge's loss decides which step is kept, the model's own may well have grown.
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
    """What summary.json says of the run, whose last evaluation is ``found``."""
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
