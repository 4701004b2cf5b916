"""The options of merging, diagnosing and sweeping, for the command line and the Python API. Imports no torch.

Constructing options that are out of bounds raises an error that names the flag.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

from distmerge.errors import UserError
from distmerge.merging.recipe import SHARD_SIZE

CHUNK = 1 << 20
"""The default number of elements that a thread takes at a time."""

Compat = Literal["paper", "mergekit"]


@dataclass(frozen=True)
class StreamOptions:
    """How models are read and computed with. Only ``device`` can change the bytes of the output.

    Attributes:
        threads: how many threads share the work; None for one for each core that the process may use.
        chunk: elements that a thread takes at a time, from 1 to 2^40.
        device: where the arithmetic is done, "cpu" or "cuda".
        allow_pickle: read pickles as well: .bin files (weights only), DCP and DeepSpeed checkpoints.
    """

    threads: int | None = None
    chunk: int = CHUNK
    device: str = "cpu"
    allow_pickle: bool = False

    def __post_init__(self) -> None:
        for name, value in (("--threads", self.threads), ("--chunk", self.chunk)):
            if value is not None and not 1 <= value <= 1 << 40:
                raise UserError(f"{name} must be >= 1, got {value}")

    @property
    def thread_count(self) -> int:
        return self.threads or len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class MergeOptions(StreamOptions):
    """The options of a merge other than its models, its method and the method's parameters.

    Attributes:
        compat: whose form of the method is computed; None for the recipe's own choice (mergekit in YAML, else paper).
        seed: of random masks; None for the recipe's own, or 0.
        dtype: round the inputs to it first: "float64", "float32", "float16" or "bfloat16"; None leaves them as they are.
        out_dtype: the output's dtype; None for ``dtype`` if that is given, else each tensor's own.
        tokenizer: "base", "union" or a model of the recipe, whose tokens the output gets; not with a recipe in a file.
        shard_size: the largest file of the output, such as "500MB".
        stochastic: round to bfloat16 stochastically, with this seed; None rounds to nearest.
        report: diagnose the inputs in the same pass, and write report.json beside the model.
        rank: of the adapter that the methods svd and extract make.
    """

    compat: Compat | None = None
    seed: int | None = None
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer: str | None = None
    shard_size: str = SHARD_SIZE
    stochastic: int | None = None
    report: bool = False
    rank: int | None = None


@dataclass(frozen=True)
class TextOptions:
    """The amount of text on which a loss is measured.

    Attributes:
        sequence_length: tokens per sequence, at least 2.
        sequences: how many sequences are drawn from each text, at least 1.
    """

    sequence_length: int = 128
    sequences: int = 64

    def __post_init__(self) -> None:
        check_text(self.sequence_length, self.sequences)


def check_text(sequence_length: int | None, sequences: int | None) -> None:
    """Refuse an amount of text that is too small to measure a loss on.

    Raises:
        UserError: naming the flag.
    """
    for name, value, least in (("--sequence-length", sequence_length, 2), ("--sequences", sequences, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} must be >= {least}, got {value}")


@dataclass(frozen=True)
class DiagnoseOptions(StreamOptions):
    """The options of a diagnosis.

    Attributes:
        files: globs of text on which losses, loss barriers and KL divergences are measured; () leaves these out.
        text: how much text.
    """

    files: tuple[str, ...] = ()
    text: TextOptions = field(default_factory=TextOptions)


@dataclass(frozen=True)
class SweepOptions(MergeOptions):
    """The options of a sweep: those of a merge, and the amount of text that each point is evaluated on."""

    text: TextOptions = field(default_factory=TextOptions)
