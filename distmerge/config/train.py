"""The configuration of a training run: frozen sections, read from TOML files and overridden on the command line.

This module imports no torch, so that help texts and errors appear at once. A user's mistake becomes a
:class:`~distmerge.errors.UserError` of one line with the key, its value and what is allowed.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from distmerge.config.checkpoints import Checkpoint, PreviewSettings, RecoverySettings, WindowSettings
from distmerge.config.data import Data
from distmerge.config.engine import EngineSettings, check_engine
from distmerge.config.experts import Examples, Expert, Stopping
from distmerge.config.mergers import DiLoCoSettings, Merge, NoMergeSettings
from distmerge.config.section import Section, given
from distmerge.errors import UserError


class MeshSettings(Section):
    workers: int = Field(default=1, ge=1)
    """Number of replicas that train independently between merges. Ranks per worker = world size / workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL if every local rank has a GPU of its own, else the CPU with gloo. cuda: ranks may share GPUs."""
    timeout_seconds: float = Field(default=600.0, ge=1, le=1e6)
    """Time limit for collectives and for all ranks to start. A collective that takes longer ends the job, since a rank must
    have died."""
    watchdog_seconds: float | None = Field(default=None, ge=1, le=1e6)
    """After the first step, end the job if no step, evaluation or commit is completed for this long, and name the slowest rank.
    Off by default. The limit must exceed the longest evaluation, commit and wait for a sibling expert."""


class Model(Section):
    config: dict[str, Any] | None = None
    """The configuration of a causal language model of transformers: model_type and the keys of that type. vocab_size is by
    default the tokenizer's. The weights are drawn from the seed."""
    path: str | None = None
    """Directory or hub id of a pretrained causal language model. Give either this or config."""

    @model_validator(mode="after")
    def one_source(self) -> Model:
        if (self.config is None) == (self.path is None):
            raise UserError("path must be given exactly when config is not, got " + given(self.config, self.path))
        if self.config is not None and "model_type" not in self.config:
            raise UserError('config must have model_type, such as "llama"')
        return self


class Train(Section):
    batch_size: int = Field(default=8, ge=1)
    """Sequences per rank and micro step."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Micro steps per optimizer step."""
    gradient_clip: float = Field(default=1.0, ge=0)
    """Clip the gradient to this norm. 0 disables clipping."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward and backward pass. Parameters and optimizer state are always float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads per rank. By default the machine's cores / local ranks."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """The inner optimizer. muon: torch.optim.Muon for the hidden matrices, AdamW for embeddings, head and vectors."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the inner optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's averaging coefficients."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay. It applies to tensors with two or more dimensions."""


class Schedule(Section):
    name: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Course of the learning rate after the warmup. wsd (warmup-stable-decay): constant, then a decay over the last steps."""
    curve: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """Shape of the final decay (wsd)."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warmup."""
    decay: int = Field(default=0, ge=0)
    """Steps of the final decay (wsd)."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Learning rate at the end of the decay, as a share of the peak rate."""


class Evaluate(Section):
    every: int = Field(default=100, ge=1)
    """Steps between evaluations. There is always one at the start and one at the end."""
    sequences: int = Field(default=256, ge=1)
    """Number of sequences to evaluate on, drawn once from all of the held-out text, or all of it if it has fewer. They are the
    same for every seed, batch size and number of ranks, so that runs can be compared."""

    @model_validator(mode="before")
    @classmethod
    def refuse_batches(cls, values: Any) -> Any:
        if isinstance(values, dict) and "batches" in values:
            raise UserError(
                f"batches is now sequences, which are drawn from all of the held-out text: instead of batches = "
                f"{values['batches']} write sequences = {values['batches']} x train.batch_size, as a number"
            )
        return values


class Log(Section):
    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""


class TrainConfig(Section):
    """The configuration of a training run. All keys but run_dir and [model] have defaults."""

    run_dir: str = Field(min_length=1)
    """Directory for all output of the run. A run that is started again with the same directory resumes."""
    plugins: tuple[str, ...] = ()
    """Modules to import because they define rules. They may be in the working directory. A config.toml in a run directory never
    imports modules."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the initial weights, the order of the data, and dropout."""
    steps: int = Field(default=400, ge=1)
    """Number of inner steps of each worker."""
    mesh: MeshSettings = MeshSettings()
    model: Model
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    merge: tuple[Merge, ...] = ()
    """The mergers, in the order in which they act at a step. One worker has no mergers; its ranks are data parallel."""
    engine: EngineSettings = EngineSettings()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    window: WindowSettings | None = None
    preview: PreviewSettings | None = None
    recovery: RecoverySettings = RecoverySettings()
    log: Log = Log()
    expert: Expert | None = None
    stopping: Stopping = Stopping()
    examples: Examples = Examples()

    @model_validator(mode="after")
    def consistent(self) -> TrainConfig:
        merge = tuple(self.completed(index, entry) for index, entry in enumerate(self.merge))
        object.__setattr__(self, "merge", merge)  # bypasses frozen, to set the defaults that depend on the run
        if self.mesh.workers > 1 and not self.merge:
            raise UserError(
                f"merge must have an entry when mesh.workers is {self.mesh.workers}, got none "
                '(kind = "none" for workers that merge only at the end)'
            )
        if self.mesh.workers == 1 and self.merge:
            raise UserError(f"mesh.workers must be >= 2 for a [[merge]] of kind {self.merge[0].kind}, got 1")
        self.consistent_mergers()
        if self.schedule.warmup + self.schedule.decay > self.steps:
            raise UserError(
                f"schedule.warmup + decay must be <= steps = {self.steps}, got {self.schedule.warmup} + {self.schedule.decay}"
            )
        if self.window is not None and self.schedule.name not in ("constant", "wsd"):
            raise UserError(
                'schedule.name must be "constant" or "wsd" with a [window], whose blocks have one learning rate each, '
                f'got "{self.schedule.name}"'
            )
        if self.preview is not None and self.window is None:
            raise UserError("window must be given with a [preview], which merges its blocks, got none")
        if self.recovery.enabled and self.window is None and self.recovery.merge_last > self.checkpoint.keep:
            raise UserError(
                f"recovery.merge_last must be <= checkpoint.keep = {self.checkpoint.keep}, got {self.recovery.merge_last}"
            )
        check_engine(self)
        if self.schedule.name == "wsd" and self.schedule.decay == 0:
            raise UserError('schedule.decay must be >= 1 for schedule.name "wsd", got 0')
        self.consistent_expert()
        return self

    def completed(self, index: int, entry: Merge) -> Merge:
        try:
            return entry.completed(self.mesh.workers, self.steps)
        except UserError as error:
            raise UserError(f"merge[{index}].{error}") from None

    def consistent_mergers(self) -> None:
        """Refuse mergers that would undo each other's merges: only one can keep an anchor, which must hold the parameters that
        the workers have last agreed on.

        Raises:
            UserError: naming the entries.
        """
        outer = [index for index, entry in enumerate(self.merge) if isinstance(entry, DiLoCoSettings)]
        if len(outer) > 1:
            raise UserError(
                f"merge must have at most one entry of kind diloco or streaming-diloco, whose outer steps would undo each "
                f"other's, got entries {', '.join(map(str, outer))}"
            )
        if len(self.merge) > 1 and any(isinstance(entry, NoMergeSettings) for entry in self.merge):
            raise UserError(
                'merge must have no further entry with kind "none", which is for workers that merge only at the end'
            )

    def consistent_expert(self) -> None:
        if self.examples.track and (self.checkpoint.at is None or self.data.streaming):
            raise UserError("checkpoint.at must be given, and data.streaming be false, for examples.track = true")
        if self.expert is None:
            if self.stopping.rule == "merged":
                raise UserError('expert must be given for stopping.rule "merged", got none')
            return
        if self.model.path is None:
            raise UserError("model.path must be given with an [expert], which starts from a trained model, got none")
        if self.stopping.rule == "merged" and self.checkpoint.at is None:
            raise UserError('checkpoint.at must be given for stopping.rule "merged", which evaluates those steps, got none')
        if self.stopping.rule == "merged" and self.stopping.after > self.steps:
            raise UserError(
                f"stopping.after must be <= steps = {self.steps}, or no evaluation counts, got {self.stopping.after}"
            )
        if self.stopping.rule == "merged" and self.mesh.workers > 1:
            raise UserError(f'mesh.workers must be 1 for stopping.rule "merged", got {self.mesh.workers}')
        if self.expert.lora is not None and self.window is not None:
            raise UserError("window must not be given with expert.lora: its blocks are whole models")
