"""Parallel-train-then-merge at toy size: what it keeps, what it costs, where the published curves appear and where not.

`distmerge ptm` over several seeds, byte-level Llamas of 0.99M parameters on real text. Resumable: runs that are finished are
not run again.

    python benchmarks/ptm.py [--small] [--seeds N] [--out DIR] [--record] [--general GLOB ...] [--skill NAME[=GLOB] ...]
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable
from typing import Any

from report import RECORDS, Report, parser, spread

from distmerge.cli.experts import skills_of
from distmerge.cli.training import train_one
from distmerge.config.toml import validate_as
from distmerge.studies.config import PtmConfig
from distmerge.studies.ptm import experiment
from distmerge.studies.report import heat_map, mean_and_spread, pareto

MODEL = {
    "model_type": "llama",
    "hidden_size": 160,
    "intermediate_size": 432,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
FULL = {"base": 1500, "general": 100, "skill": 70}
SMALL = {"base": 60, "general": 60, "skill": 24}


def configuration(options: Any, report: Report) -> PtmConfig:
    steps = SMALL if options.small else FULL
    seeds = list(range(1 if options.small else options.seeds))
    table = {
        "out": str(report.out / "runs"),
        "seeds": seeds,
        "processes": min(len(seeds), len(os.sched_getaffinity(0))),
        "general": options.general,
        "skills": skills_of(options.skill),
        "pretraining": "general",
        "steps": steps,
        "omegas": [0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        "replay": [0.25] if options.small else [0.25, 0.5],
        "shorter": [0.5] if options.small else [0.2, 0.3, 0.4, 0.5, 0.6, 0.7],
        "model": {"config": MODEL},
        "train": {"batch_size": 8, "threads": 1},
        "optimizer": {"lr": 3e-3},
        "finetune_lr": 5e-4,
        "schedule": {"name": "wsd", "warmup": 10, "decay": steps["skill"] // 2, "curve": "linear"},
    }
    return validate_as(PtmConfig, table)


def judge(report: Report, results: dict[str, Any]) -> None:
    """The bars, of the skill for which each holds least."""
    skills = results["skills"].values()
    claim = (
        "general loss above PTM's of continued finetuning that ends at its skill loss: mean less deviation, worst skill, nats"
    )
    report.bar(claim, worst(skills, "equal_excess"), ">=", 0.05, quality=True)
    claim = "continued finetuning's general loss above PTM's at the nearest skill loss: mean less deviation, worst skill, nats"
    report.bar(claim, worst(skills, "cft_general_excess"), ">=", 0.05, quality=True)
    gap = max(max(found["skill_gap"]) for found in skills)
    claim = "the skill loss that PTM lacks there, as a share of continued finetuning's, worst skill and seed"
    report.bar(claim, gap, "<=", 0.05, quality=True)
    claim = "the same excess where PTM's skill loss is 5% above continued finetuning's: mean less deviation, worst skill, nats"
    report.bar(claim, worst(skills, "similar_excess"), ">=", 0.05, quality=True)
    gap = max(max(found["similar_gap"]) for found in skills)
    report.bar(
        "PTM's skill loss there above continued finetuning's, share, worst skill and seed", gap, "<=", 0.0501, quality=True
    )
    cost = min(statistics.mean(found["rt_tokens"]) / statistics.mean(found["ptm_tokens"]) for found in skills)
    report.bar("retraining's tokens over PTM's", cost, ">=", 2.0)
    away = [abs(knee - omega) for found in skills for knee, omega in zip(found["knee"], found["omega"], strict=True)]
    report.data["knee_distance"] = spread(away)
    claim = "the knee of PTM's curve lies this far from |D| / |G|, mean over skills and seeds"
    report.bar(claim, statistics.mean(away), "<=", 0.25, quality=True)
    report.data["rule"] = results["summary"]["rule"]


def worst(skills: Iterable[dict[str, Any]], key: str) -> float:
    """The mean over the seeds less their deviation, of the skill where it is least."""
    return min(mean - deviation for mean, deviation in (mean_and_spread(found[key]) for found in skills))


def main() -> None:
    arguments = parser(__doc__, seeds=3)
    arguments.add_argument(
        "--general", nargs="+", default=[], metavar="GLOB", help="other general text than the library's prose"
    )
    arguments.add_argument(
        "--skill", action="append", default=[], metavar="NAME[=GLOB]", help="other skills than the library's"
    )
    options = arguments.parse_args()
    report = Report("ptm", options)
    results = experiment(configuration(options, report), train_one)
    judge(report, results)
    report.data |= {key: results[key] for key in ("arms", "skills", "interference")}
    report.data["config"] = {key: value for key, value in results["config"].items() if key not in ("out", "general", "skills")}
    report.data["several"] = [seed["several"] for seed in results["seeds"]]
    if report.recording:
        for skill in results["skills"]:
            pareto(skill, results["seeds"]).savefig(RECORDS / f"ptm-{skill}.png", dpi=90)
        heat_map(results["interference"]).savefig(RECORDS / "ptm-interference.png", dpi=90)
    for row in results["arms"]:
        report.say(json.dumps(row))
    report.finish()


if __name__ == "__main__":
    main()
