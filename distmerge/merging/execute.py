"""Runs a recipe after all its checks: merges its tensors on threads, and writes the report and the record."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from distmerge.files.digests import Digests
from distmerge.files.output import RECORD
from distmerge.files.publish import Report, write_model
from distmerge.files.rounding import Rounding
from distmerge.files.sources import Maps
from distmerge.files.stream import Settings, Stream, check_device
from distmerge.merging.diagnosis import Diagnosis, Similarity, summarise
from distmerge.merging.jobs import build, observed
from distmerge.merging.options import MergeOptions, StreamOptions
from distmerge.merging.pairing import Pairing
from distmerge.merging.prepare import PreparedMerge
from distmerge.merging.recipe import Recipe
from distmerge.merging.record import as_json, card, record
from distmerge.merging.results import MergeResult
from distmerge.merging.survey import ThresholdSurvey
from distmerge.merging.vocabulary import Alignment
from distmerge.rules import catalogue


def execute(prepared: PreparedMerge, out: Path, options: MergeOptions, digests: Digests) -> MergeResult:
    """Run a prepared merge into the directory ``out``.

    Args:
        digests: hashes inputs and outputs; it has begun with the inputs already.
    """
    started = time.monotonic()
    recipe, pairings, small = prepared.recipe, prepared.pairings, prepared.small
    settings = settings_of(options)
    maps = Maps()
    survey = survey_of(recipe, pairings)
    alignment = Alignment(recipe, prepared.models) if recipe.tokenizer is not None else None
    jobs = build(recipe, pairings, maps, survey.thresholds if survey else [], alignment)
    if alignment is not None:
        config = json.loads(small["config.json"]) | {"vocab_size": alignment.size}
        small = alignment.files | small | {"config.json": as_json(config)}
    observer = Similarity() if options.report else None
    if observer is not None:
        jobs = [observed(job, pairing, maps) for job, pairing in zip(jobs, pairings, strict=True)]
    diagnosis: Diagnosis | None = None
    with Stream(jobs, settings, survey, observer) as stream:
        stream.rounding = Rounding(options.stochastic)

        def close(report: Report) -> dict[str, bytes]:
            nonlocal diagnosis
            said = {RECORD: as_json(record(recipe, report.outputs, report.inputs)), "README.md": card(recipe, out.name)}
            if options.report:
                diagnosis = summarise(report.notes, *roles(pairings[0]))
                said["report.json"] = as_json(diagnosis.as_dict())
            return small | said

        report = write_model(stream, out, prepared.identity, prepared.shard_bytes, close, digests)
    size = sum(int(entry["bytes"]) for entry in report.outputs.values())
    seconds = time.monotonic() - started
    return MergeResult(out, recipe.method, "model", len(jobs), size, seconds, report.outputs, report.inputs, diagnosis)


def roles(pairing: Pairing) -> tuple[list[str], str, bool]:
    """The models whose task vectors a report measures, the model that these start from, and whether that is their base."""
    origin, members = pairing.base or pairing.origin, [item.model for item in pairing.members]
    return (members, origin.model, True) if origin else (members[1:], members[0], False)


def settings_of(options: StreamOptions) -> Settings:
    """The stream's settings. Also turns off torch's own threads, since the stream's threads share the work."""
    check_device(options.device)
    torch.set_num_threads(1)
    return Settings(options.thread_count, options.chunk, options.device)


def survey_of(recipe: Recipe, pairings: list[Pairing]) -> ThresholdSurvey | None:
    """The survey that finds the thresholds of a global trim before the merge; None if the recipe needs none."""
    form = catalogue.variants(recipe.method, recipe.compat, recipe.variants)
    if catalogue.entry(recipe.method).sparsify != "magnitude" or form["trim"] != "global":
        return None
    return ThresholdSurvey.of(pairings)
