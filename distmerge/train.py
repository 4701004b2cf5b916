"""Training: build the parts, the loop, close. Every merge is a line of the loop."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distmerge import config as sections
from distmerge.checkpoints.store import Store, guarded, reader
from distmerge.config import TrainConfig
from distmerge.data import IndexedBatches, open_corpus
from distmerge.engine.torch import StepResult, TorchEngine
from distmerge.evaluate import evaluate
from distmerge.flat import FlatParameters, fingerprint
from distmerge.launch import Place
from distmerge.mesh import Mesh
from distmerge.metrics import Metrics, megabytes
from distmerge.model import build_model, load_tokenizer, save_model
from distmerge.rundir import Lock, RunDirectory, write_atomically
from distmerge.schedule import lr_factor
from distmerge.stream import StreamBatches, stream_corpus
from distmerge.workers.diloco import DiLoCo, MergeReport


def train(config: TrainConfig, place: Place, command: list[str]) -> None:
    """Train one run to its end, from its beginning or from its newest valid checkpoint."""
    mesh = Mesh(config.mesh, place, config.train.threads)
    try:
        directory = RunDirectory(config.run_dir)
        lock = take_lock(directory, config, mesh, command)
        run = Run(config, mesh, directory)
        run.resume()
        loop(run)
        run.close()
        lock.release()
    except RuntimeError as error:
        raise name_dead_peers(mesh, error) from error
    mesh.close()


def loop(run: Run) -> None:
    config, engine = run.config, run.engine
    run.log_start()
    while run.step < config.steps:
        lr = config.optimizer.lr * lr_factor(config.schedule, run.step, config.steps)
        result = engine.train_step(run.batches.batch(run.step), lr)
        merges = [report for merger in run.mergers if (report := merger.step())]
        run.step += 1
        run.observe(result, lr, merges)
        if run.due(config.log.every) or run.due(config.evaluate.every):
            run.log(evaluated=run.due(config.evaluate.every) and run.step < config.steps)
        if run.due(config.checkpoint.every):
            run.commit()


class Run:
    """The parts of a run, and the state that is none of theirs: the step, and the metrics' totals."""

    def __init__(self, config: TrainConfig, mesh: Mesh, directory: RunDirectory):
        self.config, self.mesh, self.directory = config, mesh, directory
        with mesh.together():
            self.tokenizer = load_tokenizer(config.data.tokenizer)
            model = build_model(config.model, self.tokenizer, config.seed)
            self.batches, self.held_out = mesh.lead_first("data", self._open_data)
        self.engine = TorchEngine(model, config, mesh)
        with mesh.together():
            self.mergers = [build_merger(entry, self.engine.parameters, mesh) for entry in config.merge]
        check_same_start(self.engine.parameters)
        torch.manual_seed(config.seed * 1_000_003 + mesh.rank)  # dropout draws apart on each rank
        self.store = Store(directory.checkpoints, mesh, config.checkpoint.keep)
        self.step = 0
        self.metrics: Metrics | None = None
        self.totals = {"seconds": 0.0, "log_seconds": 0.0, "log_steps": 0, "metrics_bytes": 0, "first_eval": None}
        self.loss_sum = torch.zeros((), device=mesh.device)
        self.last: dict[str, Any] = {}
        self.clock = time.perf_counter()

    def _open_data(self) -> tuple[IndexedBatches | StreamBatches, Any]:
        section, rows = self.config.data, self.config.train
        if section.streaming:
            batches = self.config.evaluate.batches * rows.batch_size
            return stream_corpus(section, self.mesh, rows.gradient_accumulation, rows.batch_size, batches)
        corpus = open_corpus(section)
        place = (self.mesh.rank, self.mesh.world, rows.gradient_accumulation, rows.batch_size)
        return IndexedBatches(corpus.train, self.config.seed, *place), corpus.held_out

    @property
    def tokens_per_step(self) -> int:
        rows = self.config.train.batch_size * self.config.train.gradient_accumulation
        return rows * self.config.data.sequence_length * self.mesh.world

    def due(self, every: int) -> bool:
        return self.step % every == 0

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one."""
        self.store.open()
        path, rejections = self.store.newest_valid()
        if path is not None:
            read = reader(path)
            self.engine.load_state_files(read)
            self._load(read(f"rank-{self.mesh.rank:05}.pt"))
        if self.mesh.leads:
            self.metrics = Metrics(self.directory, self.totals["metrics_bytes"], self.config.steps)
            for rejection in rejections:
                self.metrics.say(f"rejected checkpoint {rejection.path}: {rejection.reason}")
            if path is not None:
                self.metrics.say(f"resuming from {path}")

    def commit(self) -> None:
        """Publish everything that later steps depend on."""
        with self._clock_stopped():
            if self.metrics is not None:
                self.totals["metrics_bytes"] = self.metrics.bytes_written
            self.store.commit(self.step, self.engine.state_files() | {f"rank-{self.mesh.rank:05}.pt": self._state()})

    def _state(self) -> dict[str, Any]:
        cuda = self.mesh.device.type == "cuda"
        return {
            "step": self.step,
            "mergers": [merger.state_dict() for merger in self.mergers],
            "batches": self.batches.state_dict(),
            "generators": [torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None],
            "totals": self.totals,
            "loss_sum": self.loss_sum,
            "last": self.last,
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        for merger, merger_state in zip(self.mergers, state["mergers"], strict=True):
            merger.load_state_dict(merger_state)
        self.batches.load_state_dict(state["batches"])
        torch.set_rng_state(state["generators"][0])
        if state["generators"][1] is not None:
            torch.cuda.set_rng_state(state["generators"][1])
        self.totals, self.last = state["totals"], state["last"]
        self.loss_sum.copy_(state["loss_sum"])

    def observe(self, result: StepResult, lr: float, merges: list[MergeReport]) -> None:
        """Keep what the next line of the log will say. Nothing here waits for the device."""
        self.loss_sum += result.loss
        self.totals["log_steps"] += 1
        self.last["grad_norm"], self.last["lr"] = result.grad_norm, lr
        for report in merges:
            self.last["merge/seconds"] = self.last.get("merge/seconds", 0.0) + report.seconds
            self.last["merge/divergence"] = report.divergence
            self.last["merge/correlation"] = report.correlation

    def log_start(self) -> None:
        self.clock = time.perf_counter()
        if self.step == 0:
            self.log(evaluated=True)

    def log(self, evaluated: bool) -> None:
        """One line of metrics; with the evaluation's, where one is due."""
        eval_loss = self.evaluate() if evaluated else None
        self._read_clock()
        if self.metrics is None:
            self._reset_log()
            return
        steps, seconds = self.totals["log_steps"], self.totals["log_seconds"]
        grad_norm = self.last.pop("grad_norm", None)
        line = {
            "step": self.step,
            "tokens": self.step * self.tokens_per_step,
            "train/loss": self.loss_sum.item() / steps if steps else None,
            "eval/loss": eval_loss,
            "grad_norm": None if grad_norm is None else grad_norm.item(),
            "tokens_per_second": steps * self.tokens_per_step / seconds if steps else None,
            "merge/bytes_sent": self.bytes_sent,
            "merge/collectives": sum(merger.peers.ledger.collectives for merger in self.mergers),
        }
        self.metrics.write({key: value for key, value in (line | self.last).items() if value is not None})
        self._reset_log()

    def _reset_log(self) -> None:
        self.loss_sum.zero_()
        self.last = {}
        self.totals["log_steps"], self.totals["log_seconds"] = 0, 0.0

    @property
    def bytes_sent(self) -> float:
        return sum(merger.bytes_sent for merger in self.mergers)

    def evaluate(self) -> float:
        """The loss of what the workers share: the anchor, where a merger keeps one; else each worker's own part."""
        with self._clock_stopped(), self._anchor_in_place():
            section = self.config.evaluate
            place = (self.mesh.rank, self.mesh.world)
            loss = evaluate(self.engine.model, self.held_out, self.config.train.batch_size, section.batches, *place).loss
        if self.totals["first_eval"] is None:
            self.totals["first_eval"] = loss
        return loss

    @contextlib.contextmanager
    def _anchor_in_place(self) -> Iterator[None]:
        anchor = next((merger.anchor for merger in self.mergers if merger.anchor is not None), None)
        if anchor is None:
            yield
            return
        flat = self.engine.parameters
        flat.pull()
        own = flat.vector.clone()
        flat.vector.copy_(anchor)
        flat.push()
        yield
        flat.vector.copy_(own)
        flat.push()

    @contextlib.contextmanager
    def _clock_stopped(self) -> Iterator[None]:
        """Evaluations and checkpoints don't count as training time."""
        self._read_clock()
        yield
        self.clock = time.perf_counter()

    def _read_clock(self) -> None:
        now = time.perf_counter()
        self.totals["seconds"] += now - self.clock
        self.totals["log_seconds"] += now - self.clock
        self.clock = now

    def close(self) -> None:
        """Keep the last state, merge what is left to merge, publish the model, and say what came out."""
        if not self.due(self.config.checkpoint.every):
            self.commit()
        for merger in self.mergers:
            merger.finish()
        loss = self.evaluate()
        if self.metrics is not None:
            line = {"step": self.step, "tokens": self.step * self.tokens_per_step, "eval/loss": loss}
            self.metrics.write(line | {"merge/bytes_sent": self.bytes_sent})
            self.metrics.close()
        with self.mesh.together():
            if self.mesh.leads:
                temporary = self.directory.path / ".final"
                shutil.rmtree(temporary, ignore_errors=True)
                guarded(temporary, lambda: save_model(self.engine.model, self.tokenizer, temporary))
                self.directory.publish_final(temporary)
                write_atomically(self.directory.summary, json.dumps(self.summary(loss), indent=2) + "\n")
                print(table(self.directory, self.summary(loss)))

    def summary(self, loss: float) -> dict[str, Any]:
        numel = self.engine.parameters.whole.numel()
        ranks = self.mesh.world
        tokens = self.step * self.tokens_per_step
        return {
            "steps": self.step,
            "workers": self.mesh.workers,
            "ranks": ranks,
            "parameters": numel,
            "eval_loss_first": self.totals["first_eval"],
            "eval_loss_last": loss,
            "tokens": tokens,
            "tokens_per_second": tokens / self.totals["seconds"],
            "bytes_sent": self.bytes_sent,
            "bytes_sent_by_data_parallelism": self.step * 4 * numel * 2 * (ranks - 1) / ranks,
        }


def build_merger(entry: sections.Merge, flat: FlatParameters, mesh: Mesh) -> DiLoCo:
    """The merger that a [[merge]] entry asks for, among this rank's peers."""
    match entry:
        case sections.DiLoCo():
            outer = {"outer_lr": entry.outer_lr, "outer_momentum": entry.outer_momentum, "nesterov": entry.nesterov}
            return DiLoCo(flat, entry.every, **outer, group=mesh.peers, bucket_bytes=entry.bucket_bytes)
        case sections.Average():
            return DiLoCo(flat, entry.every, 1.0, 0.0, group=mesh.peers, bucket_bytes=entry.bucket_bytes)
        case sections.NoMerge():
            return DiLoCo(flat, sys.maxsize, 1.0, 0.0, group=mesh.peers)


def check_same_start(flat: FlatParameters) -> None:
    """All ranks of all workers start from the same bits."""
    digest = fingerprint(flat.whole).reshape(1)
    theirs: list[Tensor] = [torch.empty_like(digest) for _ in range(dist.get_world_size())]
    dist.all_gather(theirs, digest)
    assert all(torch.equal(other, digest) for other in theirs), "the ranks start from different parameters"


def take_lock(directory: RunDirectory, config: TrainConfig, mesh: Mesh, command: list[str]) -> Lock:
    """The run directory, for all ranks of this job and no other."""
    with mesh.together():
        directory.check(config)
        lock = Lock(directory)
        if mesh.leads:
            lock.take_job()
            directory.begin(config, command)
    lock.join(mesh.rank)
    return lock


def name_dead_peers(mesh: Mesh, error: RuntimeError) -> BaseException:
    """What to raise for an error of the training: with the ranks' names, if peers died in a collective."""
    text = str(error)
    if not isinstance(error, dist.DistError) and not any(word in text.lower() for word in ("gloo", "nccl", "connection")):
        return error
    missing = mesh.missing_ranks()
    if not missing:
        return error
    names = ", ".join(f"{rank} (worker {rank // mesh.shards})" for rank in missing)
    print(f"error: rank {names} died or stopped answering; start the same command again to resume", file=sys.stderr)
    return SystemExit(1)


def table(directory: RunDirectory, summary: dict[str, Any]) -> str:
    """The end of a run, for people."""
    board = Path(sys.executable).with_name("tensorboard")
    sent, data_parallel = summary["bytes_sent"], summary["bytes_sent_by_data_parallelism"]
    rows = {
        "eval loss": f"{summary['eval_loss_first']:.3f} at the start, {summary['eval_loss_last']:.3f} at the end (nats/token)",
        "tokens": f"{summary['tokens']:,} ({summary['workers']} workers, {summary['ranks']} ranks, {summary['steps']} steps)",
        "tokens/s": f"{summary['tokens_per_second']:,.0f}",
        "sent per worker": f"{megabytes(sent)}; data parallelism: {megabytes(data_parallel)}"
        + (f", {data_parallel / sent:.0f}x as much" if sent else ""),
        "model": str(directory.final),
        "TensorBoard": f"{board if board.exists() else 'tensorboard'} --logdir {directory.tensorboard}",
    }
    return "\n" + "\n".join(f"{name:<16} {value}" for name, value in rows.items())
