"""Merges a window by a rule of the catalogue: parameters as in a recipe of the members, buffers by their own policies."""

from __future__ import annotations

from dataclasses import replace

from distmerge.errors import UserError
from distmerge.files.models import Model
from distmerge.files.sources import Maps
from distmerge.files.stream import Job, Survey
from distmerge.merging.assemble import Named, recipe_of
from distmerge.merging.execute import survey_of
from distmerge.merging.jobs import build
from distmerge.merging.options import MergeOptions
from distmerge.merging.pairing import check_structure, pair
from distmerge.rules import catalogue
from distmerge.windows.members import Member, dtype_of, is_parameter, merged_buffer
from distmerge.windows.options import ByRule


def rule_jobs(
    members: list[Member], base: Model | None, way: ByRule, maps: Maps, dtype: str | None
) -> tuple[list[Job], Survey | None, Model | None, list[Member]]:
    """The jobs that merge a window, in the order of the first member's tensors.

    Args:
        base: the model that the rule's task vectors start from. If the rule needs one and it is None, the oldest member is the
            base.
        dtype: of the merged parameters; None for the members' own.

    Returns:
        the jobs; the survey that must run before them, if the rule needs one; the base, if there is one; and the members
        without the base.

    Raises:
        UserError: if the same model is given twice.
    """
    if base is None and catalogue.entry(way.rule).base == "needed":
        base, members = members[0].model, members[1:]
    models = {member.model.reference: member.model for member in members}
    if len(models) < len(members):
        raise UserError(f"--rule {way.rule} takes each member once")
    recipe = recipe_of(
        way.rule, [Named(reference) for reference in models], None if base is None else base.reference, None,
        way.parameters, MergeOptions(compat=way.compat, seed=way.seed),
    )  # fmt: skip
    check_structure(recipe)
    if base is not None:
        models[base.reference] = base
    pairings = pair(recipe, models)
    survey = survey_of(recipe, pairings)
    built = {job.name: job for job in build(recipe, pairings, maps, survey.thresholds if survey else [])}
    jobs: list[Job] = []
    for name, job in built.items():
        entries = [member.model.tensors[name] for member in members]
        if is_parameter(entries):
            jobs.append(replace(job, dtype=dtype_of(entries, dtype)))
        else:
            jobs.append(merged_buffer(name, entries, maps))
    return jobs, survey, base, members
