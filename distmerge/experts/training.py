"""What an expert's run does besides training: it publishes steps for merging, stops early, and records what it trained on.

``training.json`` beside a model records its tokens and steps of training, the model it started from and its skill; merges by
ptm take |D| and |G| from it. All runs write it, since any model can become a base or a general model.
"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from distmerge.config.train import TrainConfig
from distmerge.data.packed import IndexedBatches, open_corpus, sampled
from distmerge.data.streaming import StreamBatches
from distmerge.engine.engine import Engine
from distmerge.engine.health import health_problem
from distmerge.experts.adapt import Theta, dtype_of, save_expert
from distmerge.experts.examples import Known, nothing_known, observe, score_rows, tracked_rows
from distmerge.experts.stopping import Peak, Plateau, member_at
from distmerge.files.atomic import write_atomically
from distmerge.files.directories import guarded, publish_directory
from distmerge.judge import Judge
from distmerge.merging.in_memory import merge, read_model
from distmerge.mesh import Mesh
from distmerge.rules import catalogue

RECORD = "training.json"
SIBLING_SECONDS = 24 * 3600.0
"""How long an expert waits for a sibling that trains at the same time. A sibling that dies ends the job long before."""


class Trainable(Protocol):
    """What this module needs of a run."""

    step: int
    mesh: Mesh
    engine: Engine
    batches: IndexedBatches | StreamBatches
    held_out: Any
    tokenizer: PreTrainedTokenizerBase
    path: Path
    recovery: Any
    claim: Any

    def shared(self) -> AbstractContextManager[None]: ...
    def tell(self, step: int, event: str, facts: dict[str, Any]) -> None: ...


class ExpertTraining:
    """The part of a run, and of its state, that is specific to experts.

    Attributes:
        stopped: why the run ends before its last step; None while it goes on.
        rows, known: the tracked examples, and what is known of each.
        base: the vector ``[n]`` that task vectors start from, for the rule "merged".
        texts: held-out text of the other skills that the merge is judged on, by skill.
    """

    def __init__(self, config: TrainConfig, run: Trainable):
        self.config, self.run, self.section = config, run, config.stopping
        self.patience_seconds = SIBLING_SECONDS if run.mesh.name else None
        self.plateau = Plateau(self.section) if self.section.rule == "plateau" else None
        self.peak = Peak(self.section) if self.section.rule == "merged" else None
        self.stopped: str | None = None
        self.rows = np.empty(0, dtype=np.int64)
        if isinstance(run.batches, IndexedBatches) and config.examples.track:
            self.rows = tracked_rows(len(run.batches.data), config.examples.count, config.seed)
        self.known = nothing_known(len(self.rows))
        self.base: Tensor | None = None
        self.texts: dict[str, Any] = {}
        if self.peak is not None:
            self.base = self._vector(self.origin)
            sequences = config.evaluate.sequences
            self.texts = {
                name: sampled(open_corpus(section).held_out, sequences) for name, section in self.section.skills.items()
            }

    @cached_property
    def theta(self) -> Theta:
        """The trained parameters as a vector for merging; only for engines with whole tensors on every rank."""
        return Theta(self.run.engine.model, self.run.engine.parameters)

    @property
    def origin(self) -> str:
        """The model that this one's task vector starts from in merges."""
        assert self.config.expert is not None and self.config.model.path is not None
        return self.config.expert.base or self.config.model.path

    @cached_property
    def dtype(self) -> str:
        """The dtype of published models."""
        path = self.config.model.path
        return self.config.checkpoint.dtype or (dtype_of(path) if path is not None else "float32")

    @property
    def lr_factor(self) -> float:
        return 1.0 if self.plateau is None else self.plateau.lr_factor

    def due(self, step: int) -> bool:
        """Whether the model is published at this step."""
        match self.config.checkpoint.at:
            case "powers-of-two":
                return step & (step - 1) == 0 or step == self.config.steps
            case "every":
                return step % self.config.checkpoint.every == 0 or step == self.config.steps
        return False

    def observe(self, step: int, loss: float | None) -> None:
        """After inner step ``step``: publish the model if that is due, and decide whether to stop. A collective.

        Args:
            loss: of the evaluation at this step; None if there was none.
        """
        if loss is not None and self.plateau is not None:
            before = self.plateau.reduced
            if self.plateau.observe(self._agreed(loss)):
                self._stop(step, f"the loss has not improved on {self.plateau.best:.4f}")
            elif self.plateau.reduced > before:
                self.run.tell(step, "plateau", {"loss": loss, "lr_factor": self.plateau.lr_factor})
        if not self.due(step):
            return
        if not self.publish(step):
            return
        if len(self.rows):
            self.score_examples(step)
        if self.peak is not None:
            losses, members = self.merged_losses(step)
            mean = self._agreed(sum(losses.values()) / len(losses))
            ends = self.peak.observe(step, mean)
            self.run.tell(step, "merged", {"mean": mean, "losses": losses, "with": members, "best_step": self.peak.best_step})
            if ends and step < self.config.steps:
                self._stop(step, f"the merge was best at step {self.peak.best_step}, mean loss {self.peak.best:.4f}")

    def _agreed(self, score: float) -> float:
        """The first rank's number, on all ranks, so that they never disagree on when to stop."""
        value = torch.tensor([score], dtype=torch.float64, device=self.run.mesh.device)
        dist.broadcast(value, 0)
        return value.item()

    def _stop(self, step: int, reason: str) -> None:
        self.stopped = reason
        self.run.tell(step, "stopped", {"reason": reason})

    def publish(self, step: int) -> bool:
        """Publish the model as ``RUN_DIR/steps/step-N``, replacing that of a course from which recovery went back.

        Returns:
            whether it was published. A model with values that are not finite is not, which an event records.
        """
        run, published = self.run, self.run.path / "steps" / f"step-{step:08}"
        with run.shared(), run.mesh.raise_on_all_ranks():
            if (problem := health_problem(run.engine.parameters, run.mesh)) is not None:
                run.tell(step, "step left out", {"reason": problem})
                return False
            whole = run.engine.whole_state()
            if run.mesh.leads:
                about = run.claim.manifest_entries() | {"step": step}
                publish_directory(published, about, lambda directory: self.save(directory, step, whole))
        return True

    def score_examples(self, step: int) -> None:
        """Score the tracked examples by a forward pass over them. A collective."""
        mesh, batches = self.run.mesh, self.run.batches
        assert isinstance(batches, IndexedBatches)
        model, batch_size = self.run.engine.model, self.config.train.batch_size
        with self.run.shared():
            scores = score_rows(model, batches.data, self.rows, batch_size, mesh.rank, mesh.world)
        self.known = observe(self.known, scores, step, self.config.examples)

    def save(self, directory: Path, step: int, whole: dict[str, Tensor] | None) -> None:
        """Write the present model, or adapter, and the record of its training. ``whole`` is the engine's whole state."""
        save_expert(self.run.engine.model, self.run.tokenizer, directory, whole, self.dtype)
        (directory / RECORD).write_text(json.dumps(self.record(step), indent=2) + "\n")

    def record(self, step: int) -> dict[str, Any]:
        """The content of training.json. ``tokens`` counts all ranks in all ``step`` steps, without padding; ``distmerge eval``
        finds in ``data`` which text was held out."""
        expert, data = self.config.expert, self.config.data.model_dump(mode="json", exclude_none=True)
        indices = (self.run.recovery.batches_of(at)[-1] for at in range(step))
        ranks = self.run.mesh.world if isinstance(self.run.batches, StreamBatches) else 1
        return {
            "tool": "distmerge",
            "skill": expert and expert.skill,
            "base": self.origin if expert else None,
            "from": self.config.model.path,
            "lora": expert.lora.model_dump() if expert and expert.lora else None,
            "steps": step,
            "tokens": self.run.batches.count_tokens(indices) * ranks,
            "seed": self.config.seed,
            "data": data | {"files": [str(Path(pattern).absolute()) for pattern in self.config.data.files]},
        }

    # ---- merging in memory

    def merged_losses(self, step: int) -> tuple[dict[str, float], list[str]]:
        """Merge in memory at this step. Returns the loss on each skill, and the models that were merged with. A collective."""
        assert self.base is not None and self.config.expert is not None
        section, mesh = self.section, self.run.mesh
        with mesh.raise_on_all_ranks():
            members = mesh.lead_first(f"siblings-{step}", lambda: self._members(step))
            others = [self._vector(member) for member in members]
        own = self.theta.read()
        general_first = catalogue.entry(section.method).first == "general"
        models = [*others, own] if general_first else [own, *others]
        merged = merge(section.method, self.base, models, section.scale, section.density, self.config.seed)
        texts = {self.config.expert.skill: self.run.held_out} | self.texts
        judge = Judge(self.run.engine.model, texts, self.config.train.batch_size, mesh.rank, mesh.world)
        return judge.losses_of(self.theta.holding(merged)), members

    def _members(self, step: int) -> list[str]:
        """The directories of the models to merge with at this step."""
        return [str(member_at(name, step, self.patience_seconds)) for name in self.section.merge_with]

    def _vector(self, reference: str) -> Tensor:
        """Another model of this base as a vector."""
        return self.theta.of(read_model(reference, self.origin))

    # ---- the end, and the state

    def finish(self) -> int:
        """Before the final model is published: save what is known of the examples, and load the step that merged best.

        Returns:
            the step of the model that is then loaded.
        """
        if len(self.rows) and self.run.mesh.leads:
            path, known = self.run.path / "examples.safetensors", save(self.known._asdict())
            guarded(path, lambda: write_atomically(path, known))
        if self.peak is None or not self.peak.best_step or self.peak.best_step == self.run.step:
            return self.run.step
        best = self.run.path / "steps" / f"step-{self.peak.best_step:08}"
        with self.run.mesh.raise_on_all_ranks():
            self.load(best)
        return self.peak.best_step

    def load(self, directory: Path) -> None:
        """Set the trained parameters to those of a published step."""
        if not self.theta.adapted:
            self.theta.write(self._vector(str(directory)))
            return
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(self.run.engine.model, load_file(directory / "adapter_model.safetensors"))
        self.run.engine.parameters.check()

    def state_dict(self) -> dict[str, Any]:
        rule = self.plateau or self.peak
        return {"stopped": self.stopped, "rule": rule and rule.state_dict(), "examples": self.known._asdict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stopped, self.known = state["stopped"], Known(**state["examples"])
        rule = self.plateau or self.peak
        if rule is not None:
            rule.load_state_dict(state["rule"])
