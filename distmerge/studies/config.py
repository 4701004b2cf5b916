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

RESERVED = ("general", "other")
"""Names of texts that a skill cannot have."""


class Steps(Section):
    """Steps of each training run."""

    base: int = Field(default=500, ge=1)
    """Pretraining of the base; not used where model.path is a base."""
    general: int = Field(default=500, ge=1)
    """From the base, on the general text: |G| in steps."""
    skill: int = Field(default=200, ge=1)
    """On a skill's text: |D| in steps, both for the expert and for continued finetuning."""


class PtmConfig(Section):
    """The whole experiment. Only out and [model] have no default."""

    out: str
    """The directory of all runs and results. An experiment that is started again skips what it has finished."""
    seeds: list[int] = Field(default=[0], min_length=1)
    """Each seed is a complete experiment of its own, beginning with the base."""
    processes: int = Field(default=1, ge=1)
    """How many seeds run at the same time."""
    ranks: int = Field(default=1, ge=1)
    """Ranks of each training run, data-parallel."""
    general: list[str] = Field(default=[])
    """Globs of text files of the general ability. By default the standard library's prose."""
    other_general: list[str] = Field(default=[])
    """Globs of other general text, for replay. By default the standard library's prose if general is given, else none."""
    skills: dict[str, list[str]] = Field(default={})
    """Globs of text files by the skill's name. [] means the standard library's text of that name: code, headers, arithmetic
    or prose; by default the first three, where this machine has them."""
    characters: int = Field(default=2_000_000, ge=300_000)
    """The largest number of characters of each text. It is cut into pieces of 65,536, of which training needs two."""
    pretraining: Literal["all", "general"] = "all"
    """What the base is pretrained on: parts of general and of every skill, or of general only, so that skills are new to it."""
    steps: Steps = Steps()
    omegas: list[float] = Field(default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0], min_length=2)
    """The omegas of the sweeps, ascending. 0, the general model itself, is always included."""
    replay: list[float] = Field(default=[0.25, 0.5])
    """Shares of general text that continued finetuning mixes in, each in a run of its own."""
    shorter: list[float] = Field(default=[0.25, 0.5])
    """Continued finetuning is also run for these shares of the skill's steps, with schedules shortened to match. This shows
    what it has forgotten by the time it knows as much of the skill as PTM does."""
    eval_sequences: int = Field(default=256, ge=1)
    """Test sequences drawn from each text."""
    sequence_length: int = Field(default=128, ge=2)
    """Tokens per sequence."""
    tokenizer: str = "bytes"
    """The word bytes, or a tokenizer's directory or hub id."""
    model: Model
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    finetune_lr: float | None = Field(default=None, gt=0)
    """The peak learning rate of runs that start from a trained model; by default optimizer.lr."""
    schedule: Schedule = Schedule()

    @model_validator(mode="after")
    def sound(self) -> PtmConfig:
        if any(later <= earlier for earlier, later in pairwise([0.0, *self.omegas])):
            raise UserError(f"omegas must be > 0 and ascending, got {self.omegas}")
        if any(not 0 < share < 1 for share in self.replay):
            raise UserError(f"replay must be shares between 0 and 1, got {self.replay}")
        if any(not 0 < share < 1 for share in self.shorter) or len({f"{share:g}" for share in self.shorter}) < len(
            self.shorter
        ):
            raise UserError(f"shorter must be different shares between 0 and 1, got {self.shorter}")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds must differ, got {self.seeds}")
        for name in self.skills:
            if name in RESERVED or not re.fullmatch(r"[\w.-]+", name):
                raise UserError(f"skills must have a word as a name, other than {' and '.join(RESERVED)}, got {name!r}")
        return self

    def steps_of(self, share: float) -> int:
        """The steps of a shorter run of continued finetuning."""
        return max(1, round(share * self.steps.skill))

    def run(
        self, seed: int, name: str, steps: int, files: list[str], start: str | None, share: float = 1.0, **more: Any
    ) -> TrainConfig:
        """The configuration of one training run, in ``OUT/seed-N/NAME``.

        Args:
            files: of the training text.
            start: the model that it starts from; None trains from scratch.
            share: the factor by which the schedule's warmup and decay are shortened.
            more: sections that are added; keys of ``data`` are added to that section.
        """
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
    """The files of each text, by part: "pretraining", "train" and "test".

    Attributes:
        skills: by the skill's name.
        other: general text that the general model does not train on; None without any.
    """

    general: dict[str, str]
    skills: dict[str, dict[str, str]]
    other: dict[str, str] | None

    @property
    def tests(self) -> dict[str, str]:
        """The test file of each text, by the skill's name or "general"."""
        return {"general": self.general["test"]} | {name: parts["test"] for name, parts in self.skills.items()}


class Runs(NamedTuple):
    """The directories of the models that one seed's runs trained.

    Attributes:
        experts: trained from the base, by skill.
        finetuned: trained from the general model, by skill.
        shorter: the same with fewer steps, by skill and share of the steps.
        replayed: the same with general text mixed in, by skill and a label of the share and the text.
        retrained: trained from the base on general and skill text together, by skill.
    """

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
        UserError: naming the key. The training runs' configurations are checked as well, since they would otherwise fail hours
            later.
    """
    config = toml.validate_as(PtmConfig, toml.read_table(path) | overrides)
    for steps in (config.steps.base, config.steps.general, config.steps.skill):
        config.run(0, "any", steps, ["any"], None)
    for share in config.shorter:
        config.run(0, "any", config.steps_of(share), ["any"], None, share)
    return config
