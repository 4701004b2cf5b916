"""A kill campaign: a run with everything that holds state at once, killed at seeded moments and started again until it ends.

All of a run's bytes that anyone would use afterwards (the model, the blocks, the record without its clock) must be those of
a run that nobody killed.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

from distmerge.checkpoints.store import published_checkpoints
from distmerge.files.directories import verify
from tests import jobs

STEPS = 40

CONFIG = (
    jobs.CONFIG.partition("[[merge]]")[0]
    .replace("num_hidden_layers = 1", "num_hidden_layers = 2")
    .replace("steps = 60", f"steps = {STEPS}")
    + """
[[merge]]
kind = "sparta"
fraction = 0.05
every = 2
delay = 3

[[merge]]
kind = "diloco"
every = 8
outer_momentum = 0.5
fragments = 2
overlap = 3
mix = 0.5
wire = "int4"
error_feedback = true

[window]
every = 10
blocks = 0

[preview]
every = 10

[recovery]
enabled = true
merge_last = 1

[evaluate]
every = 10
sequences = 8

[checkpoint]
every = 3
keep = 4
async = true

[log]
every = 1
"""
)

VICTIMS = ("all ranks", "the launcher", "rank 0", "rank 1", "all ranks in a commit")


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same, however often the run was killed."""
    files = [run / "final/model.safetensors", *sorted((run / "window").glob("block-*/model.safetensors"))]
    hashes = {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    return {"files": hashes, "lines": jobs.untimed(run)}


def kill(job: jobs.Job, run: Path, victim: str) -> None:
    """SIGKILL; "in a commit" waits until one is seen, or the job ends."""
    if victim == "all ranks in a commit":
        jobs.wait_for(lambda: list((run / "checkpoints").glob(".step-*")) or job.process.poll() is not None, "a commit", 600)
    ranks = job.ranks()
    named = [process for rank, process in ranks.items() if victim == f"rank {rank}"]
    processes = [job.process.pid] if victim == "the launcher" else named or [job.process.pid, *ranks.values()]
    for process in processes:
        jobs.kill(process, signal.SIGKILL)
    jobs.wait_for(lambda: not any(map(jobs.alive, ranks.values())), "no rank survives", 600)
    job.wait(600)


def campaign(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kill ``kills`` times, in as many runs as it takes, and let each run end.

    Returns:
        ``kills``: one entry each, of the victim, the step at which it died and the one that it resumed from; ``runs``, and
        ``differing``: what of which run was not as in the uninterrupted one.
    """
    draw = random.Random(seed)
    config = jobs.write_config(folder, CONFIG)
    job = jobs.distmerge(["train", config], folder / "log")
    try:
        assert job.wait(1800) == 0, job.output
    finally:
        job.end()
    expected = outcome(folder / "run")
    done: list[dict[str, Any]] = []
    differing: list[str] = []
    runs = 0
    while len(done) < kills:
        runs += 1
        done += ended_run(folder, f"run-{runs}", config, draw, kills - len(done))
        found = outcome(folder / f"run-{runs}")
        differing += [f"run-{runs}: {key}" for key in expected if found[key] != expected[key]]
    return {"kills": done, "runs": runs, "differing": differing}


def ended_run(folder: Path, name: str, config: str, draw: random.Random, most: int) -> list[dict[str, Any]]:
    """One run, killed at most ``most`` times on the way to its end; its kills."""
    run = folder / name
    done: list[dict[str, Any]] = []
    while True:
        target = newest(run) + draw.randint(2, 14)
        victim, moment = draw.choice(VICTIMS), draw.uniform(0, 0.05)
        job = jobs.distmerge(["train", config, "--run-dir", str(run)], folder / f"log-{name}-{len(done)}")
        try:
            if len(done) == most or target >= STEPS:
                assert job.wait(1800) == 0, job.output
                return done
            jobs.wait_for(
                lambda job=job, at=target: jobs.last_step(run) >= at or job.process.poll() is not None, "a step", 1800
            )
            time.sleep(moment)  # the moment is seeded, so that it is not always the one after a line of the record
            if job.process.poll() is None:
                kill(job, run, victim)
        finally:
            job.end()
        if (run / "summary.json").exists():
            return done
        damaged = [path.name for path in published_checkpoints(run / "checkpoints") if verify(path) is not None]
        assert not damaged, f"{damaged} after a kill of {victim}"
        done.append({"victim": victim, "run": name, "died_at": jobs.last_step(run), "resumes_from": newest(run)})


def newest(run: Path) -> int:
    """The step of the newest checkpoint."""
    checkpoints = published_checkpoints(run / "checkpoints") if os.path.isdir(run / "checkpoints") else []
    return int(checkpoints[-1].name.removeprefix("step-")) if checkpoints else 0
