"""The configuration of a run: frozen sections, read from TOML, overridden from the command line.

Importing this module imports no torch, so that help and errors are instant. Every user's mistake becomes one
:class:`~distmerge.errors.UserError` line that names the key, its value and what is allowed.
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
    """Replicas that train alone between merges. Ranks per worker = world size / workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: CUDA with NCCL where every local rank has a GPU of its own, else the CPU with gloo. cuda: ranks may share GPUs."""
    timeout_seconds: float = Field(default=600.0, ge=1, le=1e6)
    """A collective that waits longer than this ends the job: the peer is taken for dead. Ranks come to the start within it."""
    watchdog_seconds: float | None = Field(default=None, ge=1, le=1e6)
    """End the job when no step, evaluation or commit ended for so long after the first step, naming the slowest rank; off by
    default. It must be longer than the longest evaluation or commit, or wait for a sibling expert."""


class Model(Section):
    config: dict[str, Any] | None = None
    """A causal language model's configuration for transformers: model_type and its keys; vocab_size comes from the
    tokenizer. The weights are drawn from the seed."""
    path: str | None = None
    """A directory or hub id of a pretrained causal language model, instead of config."""

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
    """Clip the gradient to this norm; 0 leaves it as it is."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """The arithmetic of the forward and backward pass; parameters and optimizer stay float32."""
    compile: bool = False
    """Compile the model with torch.compile."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each rank; by default the machine's cores / local ranks."""


Beta = Annotated[float, Field(ge=0, lt=1)]


class Optimizer(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: torch.optim.Muon for the hidden matrices, AdamW for embeddings, head and vectors."""
    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate of the inner optimizer."""
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    """AdamW's averaging coefficients."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled weight decay, of tensors with two or more dimensions."""


class Schedule(Section):
    name: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """The learning rate after the warmup. wsd: constant, then a decay over the last steps."""
    curve: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """The shape of wsd's final decay."""
    warmup: int = Field(default=0, ge=0)
    """Steps of linear warmup."""
    decay: int = Field(default=0, ge=0)
    """Steps of the final decay (wsd)."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """The share of the peak rate that the decay ends at."""


class Evaluate(Section):
    every: int = Field(default=100, ge=1)
    """Steps between evaluations; there is one at the start and one at the end anyway."""
    sequences: int = Field(default=256, ge=1)
    """Sequences that are judged, drawn once from all of the held-out text; all of it where it has fewer. They are the same for
    every seed, batch size and number of ranks, so runs are compared on equal text."""

    @model_validator(mode="before")
    @classmethod
    def no_batches(cls, values: Any) -> Any:
        if isinstance(values, dict) and "batches" in values:
            raise UserError(
                f"batches is now sequences, which are drawn from all of the held-out text: in place of batches = "
                f"{values['batches']} write sequences = {values['batches']} x train.batch_size, as a number"
            )
        return values


class Log(Section):
    every: int = Field(default=10, ge=1)
    """Steps between lines of metrics.jsonl."""


class TrainConfig(Section):
    """Everything that a training run is told. Only run_dir and [model] have no default."""

    run_dir: str = Field(min_length=1)
    """Where everything that the run writes lies. Started again on it, the run resumes."""
    plugins: tuple[str, ...] = ()
    """Modules to import for the rules that they define, from the working directory too. A run directory's config.toml imports
    nothing."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """Seed of the weights, the order of the data and dropout."""
    steps: int = Field(default=400, ge=1)
    """Inner steps of each worker."""
    mesh: MeshSettings = MeshSettings()
    model: Model
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    merge: tuple[Merge, ...] = ()
    """The mergers, in the order in which they act at a step. None at all, with one worker, is data parallelism."""
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
        object.__setattr__(self, "merge", merge)  # frozen from here on, with every default that depends on the run
        if self.mesh.workers > 1 and not self.merge:
            raise UserError(
                f"merge must have an entry when mesh.workers is {self.mesh.workers}, got none "
                '(kind = "none" for workers that never merge but at the end)'
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
        """Refuse mergers that undo each other: an anchor must hold what the workers last agreed on."""
        outer = [index for index, entry in enumerate(self.merge) if isinstance(entry, DiLoCoSettings)]
        if len(outer) > 1:
            raise UserError(
                f"merge must have at most one entry of kind diloco or streaming-diloco, whose outer steps would undo each "
                f"other's, got entries {', '.join(map(str, outer))}"
            )
        if len(self.merge) > 1 and any(isinstance(entry, NoMergeSettings) for entry in self.merge):
            raise UserError('merge must have no other entry beside kind "none", which is for workers that never merge')

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
            raise UserError('checkpoint.at must be given for stopping.rule "merged", which looks at those steps, got none')
        if self.stopping.rule == "merged" and self.stopping.after > self.steps:
            raise UserError(f"stopping.after must be <= steps = {self.steps}, or no look counts, got {self.stopping.after}")
        if self.stopping.rule == "merged" and self.mesh.workers > 1:
            raise UserError(f'mesh.workers must be 1 for stopping.rule "merged", got {self.mesh.workers}')
        if self.expert.lora is not None and self.window is not None:
            raise UserError("window must not be given with expert.lora: its blocks are whole models")
