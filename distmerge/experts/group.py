"""Reads the file of ``distmerge experts``: several experts of one base, trained side by side or in turn.

The file is a training configuration that all experts share, with ``run_dir`` as the folder of their runs, and with these keys:

    mode = "side-by-side"            # all at once in one job, each with its own ranks; or "in-turn", one job after another
    ranks = 8                        # ranks of each expert that does not set its own
    [[experts]]
    skill = "code"
    ranks = 2
    data = { files = ["code/*.jsonl"] }        # any section; its keys replace the shared ones

In ``stopping.merge_with``, "siblings" stands for the runs of all other experts; the merge is then also judged on their held-out
text. Siblings must train side by side, since each waits for the steps that the others publish.
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


class ExpertsSection(Section):
    """The keys of the file that do not belong to a run's configuration."""

    mode: Literal["side-by-side", "in-turn"] = "in-turn"
    """Whether the experts train at the same time."""
    ranks: int = Field(default=1, ge=1)
    """Ranks of each expert."""
    experts: list[dict[str, Any]] = Field(min_length=1)
    """For each expert its skill, its ranks, and sections that differ from the shared ones."""


class Plan(Section):
    """What the file asks for.

    Attributes:
        runs: each expert's configuration, in the file's order.
        ranks: the number of each expert's ranks.
    """

    mode: Literal["side-by-side", "in-turn"]
    runs: list[TrainConfig]
    ranks: list[int]

    def place_of(self, place: Place) -> tuple[TrainConfig, Place]:
        """The configuration of the expert that a rank of a side-by-side job trains, and its place among that expert's ranks.

        Raises:
            UserError: when the job has the wrong number of ranks, or its launcher has no store that outlives the ranks.
        """
        if place.world != sum(self.ranks):
            raise UserError(f'mode = "side-by-side": these experts need {sum(self.ranks)} ranks, got {place.world}')
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
            raise UserError('mode must be "in-turn" under this launcher; "side-by-side" needs torchrun, or no launcher')
        first = 0
        for run, ranks in zip(self.runs, self.ranks, strict=True):
            if place.rank < first + ranks:
                assert run.expert is not None
                return run, Place(place.rank - first, ranks, place.local_rank, place.local_world, run.expert.skill)
            first += ranks
        raise AssertionError("every rank has an expert")


def read(path: str, overrides: list[str]) -> Plan:
    """Read the plan in a file.

    Args:
        overrides: command line arguments ``--section.key value``, which apply to all experts.

    Raises:
        UserError: naming the expert and the key.
    """
    table = toml.read_table(path)
    keys = {key: table.pop(key) for key in ("mode", "ranks", "experts") if key in table}
    section = toml.validate_as(ExpertsSection, keys)
    for key, values in toml.parse_overrides(overrides):
        toml.put(table, key, values)
    folder = table.get("run_dir")
    if not isinstance(folder, str):
        raise UserError("config.run_dir must be given: the folder of the experts' runs")
    tables, ranks = [], []
    for index, own in enumerate(section.experts):
        own = dict(own)
        ranks.append(own.pop("ranks", section.ranks))
        skill = own.pop("skill", None)
        if not isinstance(skill, str) or not isinstance(ranks[-1], int) or ranks[-1] < 1:
            raise UserError(
                f"config.experts[{index}] must have a skill, a word, and ranks >= 1, got skill {skill!r}, ranks {ranks[-1]!r}"
            )
        merged = joined(table, own)
        merged["expert"] = joined(merged.get("expert", {}), {"skill": skill})
        merged["run_dir"] = str(Path(folder) / skill)
        tables.append(merged)
    skills = [one["expert"]["skill"] for one in tables]
    if len(set(skills)) < len(skills):
        raise UserError(f"config.experts must have different skills, got {', '.join(skills)}")
    with_siblings(tables, skills, section.mode)
    return Plan(mode=section.mode, runs=[validated(one, index) for index, one in enumerate(tables)], ranks=ranks)


def joined(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The table ``shared`` with the keys of ``own`` in place of its own; tables inside them are merged in the same way."""
    found = dict(shared)
    for key, value in own.items():
        mine = found.get(key)
        found[key] = joined(mine, value) if isinstance(mine, dict) and isinstance(value, dict) else value
    return found


def with_siblings(tables: list[dict[str, Any]], skills: list[str], mode: str) -> None:
    """Replace "siblings" in each expert's stopping.merge_with by the other experts' runs, and add their texts to its skills."""
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
    """The configuration in a table; errors name the ``index``-th expert."""
    try:
        return toml.validate(table)
    except UserError as error:
        raise UserError(f"config.experts[{index}]: {error}") from None
