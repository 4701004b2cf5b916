"""``distmerge experts``: several experts of one base, trained side by side or in turn, from one file.

The file is a training configuration whose sections all experts share, with ``run_dir`` as the folder of their runs, and

    mode = "side-by-side"            # one job: each expert its own ranks; or "in-turn": one after another, each with all ranks
    ranks = 8                        # in turn: of each expert. Side by side each [[experts]] has its own
    [[experts]]
    skill = "code"
    ranks = 2
    data = { files = ["code/*.jsonl"] }        # any section: its keys in place of the shared ones

``stopping.merge_with = ["siblings"]`` stands for the other experts' runs, and their held-out text joins what the merge is
judged by; siblings must train side by side, where each waits for what the others publish.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from distmerge.config import toml
from distmerge.config.section import Section
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.launch.ranks import Place

SIBLINGS = "siblings"


class Several(Section):
    """The keys of the file that are no part of a run's configuration."""

    mode: Literal["side-by-side", "in-turn"] = "in-turn"
    """Whether the experts train at the same time."""
    ranks: int = Field(default=1, ge=1)
    """Ranks of each expert."""
    experts: list[dict[str, Any]] = Field(min_length=1)
    """Each: skill, ranks, and sections."""


class Plan(Section):
    """Attributes: the mode; each expert's configuration and ranks, in the file's order."""

    mode: Literal["side-by-side", "in-turn"]
    runs: list[TrainConfig]
    ranks: list[int]

    def place_of(self, place: Place) -> tuple[TrainConfig, Place]:
        """Which expert a rank of a side-by-side job trains, and its place among that expert's ranks."""
        if place.world != sum(self.ranks):
            raise UserError(f"side by side these experts need {sum(self.ranks)} ranks, got {place.world}")
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise UserError('mode must be "in-turn" under this launcher: side by side needs torchrun, or none')
        first = 0
        for run, ranks in zip(self.runs, self.ranks, strict=True):
            if place.rank < first + ranks:
                assert run.expert is not None
                return run, Place(place.rank - first, ranks, place.local_rank, place.local_world, run.expert.skill)
            first += ranks
        raise AssertionError("every rank has an expert")


def read(path: str, overrides: list[str]) -> Plan:
    """The plan in a file.

    Args:
        overrides: ``--section.key value`` for all experts.

    Raises:
        UserError: naming the expert and the key.
    """
    table = toml.read_table(path)
    keys = {key: table.pop(key) for key in ("mode", "ranks", "experts") if key in table}
    several = toml.validate_as(Several, keys)
    for key, values in toml.parse_overrides(overrides):
        toml.put(table, key, values)
    folder = table.get("run_dir")
    if not isinstance(folder, str):
        raise UserError("config.run_dir must be given: the folder of the experts' runs")
    tables, ranks = [], []
    for index, own in enumerate(several.experts):
        own = dict(own)
        ranks.append(own.pop("ranks", several.ranks))
        skill = own.pop("skill", None)
        if not isinstance(skill, str) or not isinstance(ranks[-1], int) or ranks[-1] < 1:
            raise UserError(f"config.experts[{index}] must have a skill, a word, and ranks >= 1, got {skill!r}, {ranks[-1]!r}")
        merged = joined(table, own)
        merged["expert"] = joined(merged.get("expert", {}), {"skill": skill})
        merged["run_dir"] = str(Path(folder) / skill)
        tables.append(merged)
    skills = [one["expert"]["skill"] for one in tables]
    if len(set(skills)) < len(skills):
        raise UserError(f"config.experts must have different skills, got {', '.join(skills)}")
    with_siblings(tables, skills, several.mode)
    return Plan(mode=several.mode, runs=[validated(one, index) for index, one in enumerate(tables)], ranks=ranks)


def joined(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A table with another's keys in place of its own, tables inside it likewise."""
    found = dict(shared)
    for key, value in own.items():
        mine = found.get(key)
        found[key] = joined(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return found


def with_siblings(tables: list[dict[str, Any]], skills: list[str], mode: str) -> None:
    """Put the other experts' runs and texts where the file says "siblings"."""
    for index, table in enumerate(tables):
        stopping = table.get("stopping", {})
        if SIBLINGS not in stopping.get("merge_with", []):
            continue
        if mode != "side-by-side":
            raise UserError(f'config.mode must be "side-by-side" for stopping.merge_with = ["{SIBLINGS}"], got "{mode}"')
        others = [other for other in range(len(tables)) if other != index]
        named = [name for name in stopping["merge_with"] if name != SIBLINGS]
        texts = {skills[other]: tables[other].get("data", {}) for other in others}
        runs = [tables[other]["run_dir"] for other in others]
        table["stopping"] = stopping | {"merge_with": named + runs, "skills": texts | stopping.get("skills", {})}


def validated(table: dict[str, Any], index: int) -> TrainConfig:
    try:
        return toml.validate(table)
    except UserError as error:
        raise UserError(f"config.experts[{index}]: {error}") from None
