"""The configuration of ``distmerge ptm``. Imports no torch."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field, model_validator

from distmerge.config import toml
from distmerge.config.train import Model, Optimizer, Schedule, Section, Train, TrainConfig
from distmerge.errors import UserError

TAKEN = ("general", "other")
"""Names of texts that are no skills."""


class Steps(Section):
    base: int = Field(default=500, ge=1)
    """Of pretraining; none where model.path is a base."""
    general: int = Field(default=500, ge=1)
    """From the base, on the general text: |G| in steps."""
    skill: int = Field(default=200, ge=1)
    """On a skill's text: |D| in steps, for the expert as for continued finetuning."""


class PtmConfig(Section):
    """The whole experiment. Only out and [model] have no default."""

    out: str
    """Where everything lies. Started again, what is finished is not done again."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Each is a whole experiment of its own, from the base on."""
    processes: int = Field(default=1, ge=1)
    """Seeds that run at the same time."""
    ranks: int = Field(default=1, ge=1)
    """Ranks of each training run, data-parallel."""
    general: list[str] = Field(default=[])
    """Text files, as globs, of the general ability. By default the standard library's prose."""
    other_general: list[str] = Field(default=[])
    """Other general text, for replay. By default the standard library's prose, where general is given; else none."""
    skills: dict[str, list[str]] = Field(default={})
    """Text files, as globs, by the skill's name. [] is the standard library's text of that name: code, headers, arithmetic
    or prose; by default the first three, where this machine has them."""
    characters: int = Field(default=2_000_000, ge=300_000)
    """Of each text at most. It is cut into pieces of 65,536, of which training needs two."""
    pretraining: Literal["all", "general"] = "all"
    """What the base learns: a part of general and of every skill, or of general alone, so that skills are new to it."""
    steps: Steps = Steps()
    omegas: list[float] = Field(default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0], min_length=2)
    """Of the sweeps; 0 is the general model itself."""
    replay: list[float] = Field(default=[0.25, 0.5])
    """Shares of general text that continued finetuning mixes in."""
    shorter: list[float] = Field(default=[0.25, 0.5])
    """Shares of the skill's steps after which continued finetuning ends in runs of their own, their schedule as much shorter:
    what it has forgotten when it knows as much of the skill as PTM does."""
    eval_sequences: int = Field(default=256, ge=1)
    """Test sequences of each text."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens per sequence."""
    tokenizer: str = "bytes"
    """bytes, or a tokenizer's directory or hub id."""
    model: Model
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    finetune_lr: float | None = Field(default=None, gt=0)
    """Peak learning rate of the runs that start from a model; by default optimizer.lr."""
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def sound(self) -> PtmConfig:
        if any(later <= earlier for earlier, later in pairwise([0.0, *self.omegas])):
            raise UserError(f"omegas must be > 0 and ascend, got {self.omegas}")
        if any(not 0 < share < 1 for share in self.replay):
            raise UserError(f"replay must be shares between 0 and 1, got {self.replay}")
        if any(not 0 < share < 1 for share in self.shorter) or len({f"{share:g}" for share in self.shorter}) < len(
            self.shorter
        ):
            raise UserError(f"shorter must be different shares between 0 and 1, got {self.shorter}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds must differ, got {self.seeds}")
        for name in self.skills:
            if name in TAKEN or not re.fullmatch(r"[\w.-]+", name):
                raise UserError(f"skills must have a word as a name, other than {' and '.join(TAKEN)}, got {name!r}")
        return self

    def steps_of(self, share: float) -> int:
        """Of a shorter run of continued finetuning."""
        return max(1, round(share * self.steps.skill))

    def run(
        self, seed: int, name: str, steps: int, files: list[str], start: str | None, share: float = 1.0, **more: Any
    ) -> TrainConfig:
        """The configuration of one training run: ``OUT/seed-N/NAME``, from the model ``start``, or from scratch; ``share`` is
        by how much its schedule's warmup and decay are shortened."""
        folder = Path(self.out) / f"seed-{seed}"
        table: dict[str, Any] = {key: getattr(self, key).model_dump() for key in ("train", "optimizer", "schedule")}
        table |= {
            "run_dir": str(folder / name),
            "seed": seed,
            "steps": steps,
            "model": {"path": start} if start else self.model.model_dump(exclude_none=True),
            "data": {"source": "files", "files": files, "sequence_length": self.sequence_length, "tokenizer": self.tokenizer},
            "evaluate": {"every": steps, "sequences": 64},
            "checkpoint": {"every": max(100, steps // 4), "keep": 1},
            "log": {"every": max(1, steps // 20)},
        }
        if share < 1:
            warmup, decay = (round(share * table["schedule"][key]) for key in ("warmup", "decay"))
            least = min(1, self.schedule.decay)
            table["schedule"] |= {"warmup": min(warmup, steps - least), "decay": max(least, min(decay, steps - warmup))}
        table["data"] |= more.pop("data", {})
        if start and self.finetune_lr is not None:
            table["optimizer"]["lr"] = self.finetune_lr
        return toml.validate(table | more)


class Texts(NamedTuple):
    """Files of each text by part. ``skills`` by name; ``other`` is general text beside the general model's."""

    general: dict[str, str]
    skills: dict[str, dict[str, str]]
    other: dict[str, str] | None

    @property
    def tests(self) -> dict[str, str]:
        return {"general": self.general["test"]} | {name: parts["test"] for name, parts in self.skills.items()}


class Runs(NamedTuple):
    """Directories of models that one seed's runs left. By skill where there is one for each."""

    base: str
    general: str
    experts: dict[str, str]
    finetuned: dict[str, str]
    shorter: dict[str, dict[float, str]]
    replayed: dict[str, dict[str, str]]
    retrained: dict[str, str]


def read(path: str, overrides: dict[str, Any]) -> PtmConfig:
    """The configuration in a TOML file, with ``overrides`` in place of its own keys.

    Raises:
        UserError: also for what only a training run would refuse, which may come hours later.
    """
    config = toml.validate_as(PtmConfig, toml.read_table(path) | overrides)
    for steps in (config.steps.base, config.steps.general, config.steps.skill):
        config.run(0, "any", steps, ["any"], None)
    for share in config.shorter:
        config.run(0, "any", config.steps_of(share), ["any"], None, share)
    return config
