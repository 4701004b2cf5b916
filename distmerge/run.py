"""A run: its parts, its state, and what it shows. The loop is train.py's."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor

from distmerge.checkpoints import relayout
from distmerge.checkpoints.durable import guarded, reader
from distmerge.checkpoints.preview import Preview
from distmerge.checkpoints.recovery import Recovery
from distmerge.checkpoints.sound import unsound
from distmerge.checkpoints.store import Store
from distmerge.checkpoints.window import Window
from distmerge.config import TrainConfig
from distmerge.data import IndexedBatches, open_corpus
from distmerge.engine.build import build_engine
from distmerge.evaluate import evaluate
from distmerge.experts.adapt import with_lora
from distmerge.experts.training import ExpertTraining
from distmerge.files.manifest import read_manifest
from distmerge.flat import fingerprint
from distmerge.launch import REQUEUE
from distmerge.mesh import Mesh
from distmerge.metrics import Meter, MetricsLog, table
from distmerge.model import build_model, check_fits, load_tokenizer
from distmerge.preemption import Preemption
from distmerge.rundir import RunDirectory, write_atomically
from distmerge.stream import StreamBatches, stream_corpus
from distmerge.workers.build import build_mergers
from distmerge.workers.diloco import DiLoCo
from distmerge.workers.sparta import SPARTA


class Run:
    """The parts of a run. What it depends on from step to step is in their states, and in ``step``."""

    def __init__(self, config: TrainConfig, mesh: Mesh, directory: RunDirectory):
        self.config, self.mesh, self.directory = config, mesh, directory
        with mesh.together():
            self.tokenizer = load_tokenizer(config.data.tokenizer)
            model = build_model(config.model, self.tokenizer, config.seed)
            check_fits(model, self.tokenizer, config.data.sequence_length)
            if config.expert is not None and config.expert.lora is not None:
                model = with_lora(model, config.expert.lora, config.seed)
        with mesh.together():
            self.batches, self.held_out = mesh.lead_first("data", self._open_data)
        mesh.check_same("the parameters that they start from", torch.stack([fingerprint(p) for p in model.parameters()]).sum())
        self.engine = build_engine(model, config, mesh)
        with mesh.together():
            self.mergers: list[DiLoCo | SPARTA] = build_mergers(config, self.engine.parameters, mesh)
        torch.manual_seed(config.seed * 1_000_003 + mesh.rank)  # dropout draws apart on each rank
        section = config.checkpoint
        self.store = Store(directory.checkpoints, mesh, section.keep, section.asynchronous, relayout.layout(config, mesh))
        self.meter = Meter(mesh.device, self.tokens_per_step)
        self.log: MetricsLog | None = None
        self.path, self.step = directory.path, 0
        self.committed = 0  # the step of the newest checkpoint
        with mesh.together():
            self.window = self._open_window()
            self.preview = self._open_preview()
        self.recovery = Recovery(config.recovery, self)
        with mesh.together():
            self.expert = ExpertTraining(config, self)
        lead = max((max(getattr(m.settings, "overlap", 0), getattr(m.settings, "delay", 0)) for m in self.mergers), default=0)
        self.preemption = Preemption(mesh, lead)

    def _open_window(self) -> Window | None:
        section, root, flat = self.config.window, self.directory.window, self.engine.parameters
        if section is None:
            return None
        return Window(section, root, flat, self.mergers, self.mesh, self.tokens_per_step, self.tokenizer, self.tell)

    def _open_preview(self) -> Preview | None:
        section = self.config.preview
        return Preview(section, self.window, self.engine.parameters, self._loss) if section and self.window else None

    def _open_data(self) -> tuple[IndexedBatches | StreamBatches, datasets.Dataset]:
        section, rows = self.config.data, self.config.train
        place = (self.mesh.rank, self.mesh.world, rows.gradient_accumulation, rows.batch_size)
        if section.streaming:
            return stream_corpus(section, *place, eval_sequences=self.config.evaluate.batches * rows.batch_size)
        corpus = open_corpus(section)
        return IndexedBatches(corpus.train, self.config.seed, *place), corpus.held_out

    @property
    def tokens_per_step(self) -> int:
        rows = self.config.train.batch_size * self.config.train.gradient_accumulation
        return rows * self.config.data.sequence_length * self.mesh.world

    def meets(self) -> bool:
        """Whether all ranks meet in a collective of the step that ends next."""
        step, config = self.step + 1, self.config
        meetings = any(step % every == 0 for every in (config.evaluate.every, config.checkpoint.every))
        return self.mesh.workers == 1 or meetings or any(merger.due() for merger in self.mergers)

    def due(self, every: int) -> bool:
        return self.step % every == 0

    def next_batch(self) -> Tensor:
        """The next batch; those that a recovery leaves out are passed by."""
        *left_out, index = self.recovery.batches_of(self.step)
        for skipped in left_out if self.config.data.streaming else []:
            self.batches.batch(skipped)
        return self.batches.batch(index)

    def tell(self, step: int, event: str, facts: dict[str, Any]) -> None:
        """A line of events.jsonl, from the rank that writes it."""
        if self.log is not None:
            self.log.event(step, event, facts)

    def resume(self) -> None:
        """Go on from the newest valid checkpoint, if there is one."""
        self.store.open()
        self.recovery.back.finish_tainting()
        path, rejections = self.store.newest_valid(
            lambda path: relayout.check(path, read_manifest(path), self.config, self.mesh)
        )
        if path is not None:
            state = self.load_checkpoint(path)
            self.recovery.load_state_dict(state["recovery"])
            self.meter.load_state_dict(state["meter"])
        if self.window is not None:
            self.window.open(self.step)
        if self.mesh.leads:
            self.log = MetricsLog(self.directory, self.meter.log_bytes, self.config.steps, self.mesh.name)
            for note in [self.mesh.crowding, *self.engine.notes]:
                if note is not None:
                    self.log.say(note)
            for rejection in rejections:
                self.log.say(f"rejected checkpoint {rejection.path}: {rejection.reason}")
            if path is not None:
                self.log.say(f"resuming from {path}")
        self.recovery.resume(self.step)

    def commit(self) -> bool:
        """Publish everything that later steps depend on. Where some of it is not finite, say so and leave it out: False."""
        with self.meter.paused():
            if self.log is not None:
                self.meter.log_bytes = self.log.bytes_written
            files = self.engine.state_files() | {f"rank-{self.mesh.rank:05}.pt": self._state()}
            problem = self.mesh.first_problem(self.recovery.problem or unsound(files.items()))
            if problem is not None:
                self.tell(self.step, "checkpoint left out", {"reason": problem})
                return False
            self.store.commit(self.step, files)
        self.committed = self.step
        return True

    def _state(self) -> dict[str, Any]:
        cuda = self.mesh.device.type == "cuda"
        return {
            "step": self.step,
            "parts": [dataclasses.astuple(part) for part in self.engine.parameters.parts()],
            "mergers": [merger.state_dict() for merger in self.mergers],
            "batches": self.batches.state_dict(),
            "generators": [torch.get_rng_state(), torch.cuda.get_rng_state() if cuda else None],
            "window": self.window and self.window.state_dict(),
            "expert": self.expert.state_dict(),
            "recovery": self.recovery.state_dict(),
            "meter": self.meter.state_dict(),
        }

    def load_checkpoint(self, path: Path) -> dict[str, Any]:
        """The state of a checkpoint, but for the recovery and the meter, which remember what was later."""
        read, written = reader(path), read_manifest(path)
        if relayout.same(written, self.store.about):
            self.engine.load_state_files(read)
            state = read(f"rank-{self.mesh.rank:05}.pt")
        else:
            with self.mesh.together():
                state = relayout.load(self, read, written)
        self.step = self.committed = state["step"]
        if self.window is not None:
            self.window.load_state_dict(state["window"])
        for merger, merger_state in zip(self.mergers, state["mergers"], strict=True):
            merger.load_state_dict(merger_state)
        self.batches.load_state_dict(state["batches"])
        self.expert.load_state_dict(state["expert"])
        if state["generators"] is None:  # of another layout: draws go on apart, from the step
            torch.manual_seed((self.config.seed * 1_000_003 + self.mesh.rank) * 1_000_003 + self.step)
        else:
            torch.set_rng_state(state["generators"][0])
            if state["generators"][1] is not None:
                torch.cuda.set_rng_state(state["generators"][1])
        return state

    def write_line(self, eval_loss: float | None = None, preview_loss: float | None = None) -> None:
        """One line of metrics: what the meter saw since the line before."""
        line = {"step": self.step, "tokens": self.step * self.tokens_per_step}
        line |= {"eval/loss": eval_loss, "preview/loss": preview_loss}
        sent = {
            "merge/bytes_sent": self.bytes_sent,
            "merge/bytes_per_token": self.bytes_sent * self.mesh.world / line["tokens"] if self.step else None,
            "merge/collectives": sum(merger.peers.ledger.collectives for merger in self.mergers),
        }
        seen = self.meter.read()
        if self.log is not None:
            self.log.write({key: value for key, value in (line | seen | sent).items() if value is not None})

    @property
    def bytes_sent(self) -> float:
        return sum(merger.bytes_sent for merger in self.mergers)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """A stretch in which the model is what the workers share: the anchor, once a merger has moved it; else each
        worker's own part."""
        flat = self.engine.parameters
        anchor = next((merger.anchor for merger in self.mergers if merger.anchor is not None and merger.round), None)
        with self.meter.paused(), contextlib.nullcontext() if anchor is None else flat.borrowed():
            if anchor is not None:
                flat.vector.copy_(anchor)
                flat.push()
            yield

    def evaluate(self) -> float:
        """The loss of what the workers share."""
        with self.shared():
            loss = self._loss()
        if self.meter.first_eval is None:
            self.meter.first_eval = loss
        return loss

    def preview_loss(self) -> float | None:
        """What annealing would reach, as far as the merged window tells."""
        assert self.preview is not None
        with self.meter.paused():
            return self.preview.loss()

    def _loss(self) -> float:
        """The loss of the model as it stands; a collective."""
        section = self.config.evaluate
        place = (self.mesh.rank, self.mesh.world)
        return evaluate(self.engine.model, self.held_out, self.config.train.batch_size, section.batches, *place).loss

    def leave(self) -> None:
        """Keep the state for whoever starts the run again."""
        kept = self.committed == self.step or self.commit()
        self.store.wait()
        if self.log is not None:
            what = (
                f"checkpoint of step {self.step} committed"
                if kept
                else f"the state of step {self.step} is not sound and not kept"
            )
            self.log.say(f"told to leave: {what}, status {REQUEUE} asks for a requeue")
            self.log.close()
        self.engine.close()

    def close(self) -> None:
        """Keep the last state, merge what is left to merge, publish the model, and say what came out."""
        if self.committed != self.step:
            self.commit()
        self.store.wait()
        self.recovery.before_the_end(self.step)
        for merger in self.mergers:
            merger.finish()
        step = self.expert.finish()
        loss = self.evaluate()
        self.write_line(loss)
        whole = self.engine.whole_state()
        with self.mesh.together():
            if self.log is not None:
                self.log.close()
                temporary = self.directory.path / ".final"
                shutil.rmtree(temporary, ignore_errors=True)
                guarded(temporary, lambda: self.expert.save(temporary, step, whole))
                self.directory.publish_final(temporary)
                write_atomically(self.directory.summary, json.dumps(self.summary(loss), indent=2) + "\n")
                print(table(self.directory, self.summary(loss)), flush=True)
        self.engine.close()

    def summary(self, loss: float) -> dict[str, Any]:
        numel, ranks, tokens = self.engine.parameters.numel, self.mesh.world, self.step * self.tokens_per_step
        return {
            "steps": self.step,
            "stopped": self.expert.stopped,
            "workers": self.mesh.workers,
            "ranks": ranks,
            "parameters": numel,
            "eval_loss_first": self.meter.first_eval,
            "eval_loss_last": loss,
            "tokens": tokens,
            "tokens_per_second": tokens / self.meter.seconds,
            "bytes_sent": self.bytes_sent,
            "bytes_sent_by_data_parallelism": self.step * 4 * numel * 2 * (ranks - 1) / ranks,
        }
