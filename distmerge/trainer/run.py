"""A run: its components, its state, its evaluations and metrics. The loop itself is in :mod:`distmerge.trainer.loop`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmerge.checkpoints import reshard
from distmerge.checkpoints.health import unsound
from distmerge.checkpoints.store import Store
from distmerge.config.train import TrainConfig
from distmerge.data.packed import IndexedBatches, open_corpus, sampled
from distmerge.data.streaming import StreamBatches, from_lead, stream_held_out
from distmerge.engine.build import build_engine
from distmerge.evaluate import Evaluation, evaluate
from distmerge.experts.adapt import with_lora
from distmerge.experts.training import ExpertTraining
from distmerge.files.directories import reader
from distmerge.files.manifest import read_manifest
from distmerge.launch.preemption import Preemption
from distmerge.mesh import Mesh
from distmerge.model import build_model, check_fits, load_tokenizer
from distmerge.recovery.response import Recovery
from distmerge.rundir.claim import Claim
from distmerge.rundir.layout import RunDirectory
from distmerge.theta.flat import fingerprint
from distmerge.trainer.metrics import Meter, MetricsLog
from distmerge.windows.preview import Preview
from distmerge.windows.window import Window
from distmerge.workers.build import build_mergers, notes
from distmerge.workers.divergence import MergeReport
from distmerge.workers.merger import Merger


class Run:
    """The components of a run. ``step`` and the components' states are all that later steps depend on.

    Args:
        command: the command that started the run, which the run directory records.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, directory: RunDirectory, command: Sequence[str] = ()):
        self.config, self.mesh, self.directory, self.path = config, mesh, directory, directory.path
        self.preemption = Preemption(mesh, config.steps)
        with mesh.raise_on_all_ranks():
            self.tokenizer = load_tokenizer(config.data.tokenizer)
            model = build_model(config.model, self.tokenizer, config.seed)
            check_fits(model, self.tokenizer, config.data.sequence_length)
            if config.expert is not None and config.expert.lora is not None:
                model = with_lora(model, config.expert.lora, config.seed)
        with mesh.raise_on_all_ranks():
            self.batches, drawn = mesh.lead_first("data", self._open_data)
        self.held_out = from_lead(drawn) if config.data.streaming else drawn
        mesh.check_same("their initial parameters", torch.stack([fingerprint(p) for p in model.parameters()]).sum())
        self.engine = build_engine(model, config, mesh)
        with mesh.raise_on_all_ranks():
            self.mergers: list[Merger] = build_mergers(config, self.engine.parameters, mesh)
        torch.manual_seed((config.seed * 1_000_003 + mesh.rank) % 2**64)  # independent dropout on each rank
        section, layout = config.checkpoint, reshard.layout(config, mesh)
        self.claim = Claim(directory, config, mesh, command)
        self.store = Store(directory.checkpoints, mesh, section.keep, section.asynchronous, layout, self.claim.identity)
        self.meter = Meter(mesh.device, self.tokens_per_step)
        self.log: MetricsLog | None = None
        self.step = 0
        self.committed = 0  # step of the newest checkpoint
        with mesh.raise_on_all_ranks():
            self.window = self._open_window()
            self.preview = self._open_preview()
        self.recovery = Recovery(config.recovery, self)
        with mesh.raise_on_all_ranks():
            self.expert = ExpertTraining(config, self)

    def _open_window(self) -> Window | None:
        section, root, flat = self.config.window, self.directory.window, self.engine.parameters
        if section is None:
            return None
        claim = self.claim.identity
        return Window(section, root, flat, self.mergers, self.mesh, self.tokens_per_step, self.tokenizer, self.tell, claim)

    def _open_preview(self) -> Preview | None:
        section = self.config.preview
        if section is None or self.window is None:
            return None
        return Preview(section, self.window, self.engine.parameters, lambda: self._judge().loss)

    def _open_data(self) -> tuple[IndexedBatches | StreamBatches, Any]:
        """The training batches, and the sequences for evaluation. With streaming, only rank 0 draws the latter."""
        section, rows, sequences = self.config.data, self.config.train, self.config.evaluate.sequences
        place = (self.config.seed, self.mesh.rank, self.mesh.world, rows.gradient_accumulation, rows.batch_size)
        if section.streaming:
            return StreamBatches(section, *place), stream_held_out(section, sequences) if self.mesh.leads else None
        corpus = open_corpus(section)
        return IndexedBatches(corpus.train, *place), sampled(corpus.held_out, sequences)

    @property
    def tokens_per_step(self) -> int:
        rows = self.config.train.batch_size * self.config.train.gradient_accumulation
        return rows * self.config.data.sequence_length * self.mesh.world

    def due(self, every: int) -> bool:
        return self.step % every == 0

    def next_batch(self) -> Tensor:
        """The next batch, after those that recovery skips. A stream has to read the skipped ones, too."""
        *left_out, index = self.recovery.batches_of(self.step)
        for skipped in left_out if self.config.data.streaming else []:
            self.batches.batch(skipped)
        return self.batches.batch(index)

    def log_rule_choices(self, merges: list[MergeReport]) -> None:
        """Write a line of events.jsonl for each merge whose rule was chosen at the merge (``rule = "auto"``)."""
        for report in merges:
            if report.because is not None:
                self.tell(self.step, "rule chosen", {"rule": report.rule, "because": report.because})

    def tell(self, step: int, event: str, facts: dict[str, Any]) -> None:
        """Write a line of events.jsonl, if this is the rank that has the log."""
        if self.log is not None:
            self.log.event(step, event, facts)

    def resume(self) -> None:
        """Open the run's files and load the newest valid checkpoint, if there is one."""
        self.store.open()
        self.recovery.back.finish_tainting()
        path, rejections = self.store.newest_valid(
            lambda path: reshard.check(path, read_manifest(path), self.config, self.mesh)
        )
        if path is not None:
            state = self.load_checkpoint(path)
            self.recovery.load_state_dict(state["recovery"])
            self.meter.load_state_dict(state["meter"])
        if self.window is not None:
            self.window.open(self.step)
        if self.mesh.leads:
            self.log = MetricsLog(self.directory, self.meter.log_bytes, self.config.steps, self.mesh.name)
            for note in [self.mesh.oversubscription, *self.engine.notes, *notes(self.config)]:
                if note is not None:
                    self.log.say(note)
            for rejection in rejections:
                self.log.say(f"rejected checkpoint {rejection.path}: {rejection.reason}")
            if path is not None:
                self.log.say(f"resuming from {path}")
        self.recovery.resume(self.step)

    def commit(self) -> bool:
        """Publish a checkpoint of everything that later steps depend on.

        Returns:
            False if there is none because the state is unhealthy, which is then recorded as an event.
        """
        self.claim.take()
        with self.meter.paused():
            if self.log is not None:
                self.meter.log_bytes = self.log.durable_bytes()
            files = self.engine.state_files() | {f"rank-{self.mesh.rank:05}.pt": self._state()}
            problem = self.mesh.first_problem(self.recovery.problem or unsound(files.items()))
            if problem is not None:
                self.tell(self.step, "checkpoint left out", {"reason": problem})
                return False
            self.store.commit(self.step, files)
        self.committed = self.step
        self.mesh.watchdog.mark(f"the commit of step {self.step}")
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
        """Load a checkpoint, except the states of recovery and meter: after a roll-back both must keep what they know of later
        steps.

        Returns:
            the checkpoint's state on this rank.
        """
        read, written = reader(path), read_manifest(path)
        if reshard.same(written, self.store.about):
            self.engine.load_state_files(read)
            state = read(f"rank-{self.mesh.rank:05}.pt")
        else:
            with self.mesh.raise_on_all_ranks():
                state = reshard.load(self, read, written)
        self.step = self.committed = state["step"]
        if self.window is not None:
            self.window.load_state_dict(state["window"])
        for merger, merger_state in zip(self.mergers, state["mergers"], strict=True):
            merger.load_state_dict(merger_state)
        self.batches.load_state_dict(state["batches"])
        self.expert.load_state_dict(state["expert"])
        if state["generators"] is None:  # the checkpoint has another layout: seed each rank from the step
            torch.manual_seed(((self.config.seed * 1_000_003 + self.mesh.rank) * 1_000_003 + self.step) % 2**64)
        else:
            torch.set_rng_state(state["generators"][0])
            if state["generators"][1] is not None:
                torch.cuda.set_rng_state(state["generators"][1])
        return state

    def write_line(self, found: Evaluation | None = None, preview_loss: float | None = None) -> None:
        """Write one line of metrics: the meter's since the last line, and those of an evaluation or a preview."""
        line = {"step": self.step, "tokens": self.step * self.tokens_per_step}
        line |= {"eval/loss": found and found.loss, "eval/loss_se": found and found.standard_error}
        line |= {"preview/loss": preview_loss}
        sent = {
            "merge/bytes_sent": self.bytes_sent,
            "merge/bytes_per_token": self.bytes_sent * self.mesh.world / line["tokens"] if self.step else None,
            "merge/collectives": sum(merger.collectives for merger in self.mergers),
        }
        seen = self.meter.read()
        if self.log is not None:
            self.log.write({key: value for key, value in (line | seen | sent).items() if value is not None})

    @property
    def bytes_sent(self) -> float:
        return sum(merger.bytes_sent for merger in self.mergers)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """A context in which the model holds the anchor, if a merger has one and has merged; else each worker keeps its own
        parameters. Its duration is not counted as training time."""
        flat = self.engine.parameters
        anchor = next((merger.anchor for merger in self.mergers if merger.anchor is not None and merger.round), None)
        with self.meter.paused(), contextlib.nullcontext() if anchor is None else flat.borrowed():
            if anchor is not None:
                flat.vector.copy_(anchor)
                flat.push()
            yield

    def evaluate(self) -> Evaluation:
        """Evaluate the model that the workers share, see :meth:`shared`."""
        with self.shared():
            found = self._judge()
        if self.meter.first_eval is None:
            self.meter.first_eval = found.loss
        if self.step:
            self.mesh.watchdog.mark(f"the evaluation of step {self.step}")
        return found

    def preview_loss(self) -> float | None:
        """The loss of the merged window, an estimate of the loss after annealing."""
        assert self.preview is not None
        with self.meter.paused():
            return self.preview.loss(self.step)

    def _judge(self) -> Evaluation:
        """Evaluate the model in its present state; a collective over all ranks."""
        return evaluate(self.engine.model, self.held_out, self.config.train.batch_size, self.mesh.rank, self.mesh.world)
