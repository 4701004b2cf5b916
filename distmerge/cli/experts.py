"""The verbs ``experts``, ``examples`` and ``ptm``. Slow imports happen only after the flags have been checked."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from distmerge.cli.merging import globs_by_skill
from distmerge.cli.training import train_one
from distmerge.plotting import require_matplotlib
from distmerge.quiet import quiet


def add_parsers(verbs: Any) -> None:
    experts = verbs.add_parser("experts", help="train several experts of one base, or resume them", allow_abbrev=False)
    experts.add_argument("config", metavar="CONFIG.toml")
    experts.add_argument("--dry-run", action="store_true", help="print the plan (memory, tokens, merges) without training")
    experts.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # a launcher may add it
    examples = verbs.add_parser(
        "examples", help="which examples an expert memorised, and which of them a merge retained", allow_abbrev=False
    )
    examples.add_argument("run_dir", metavar="RUN_DIR", help="an expert's run with examples.track = true")
    examples.add_argument("--merged", metavar="MODEL", required=True, help="a merge of the expert with other models")
    examples.add_argument("--judge", metavar="MODEL", help="measures the difficulty: an early step of another seed's run")
    examples.add_argument("--out", metavar="DIR", help="where examples.json and examples.png go (default: RUN_DIR)")
    ptm = verbs.add_parser("ptm", help="run the parallel-train-then-merge experiment, with a report", allow_abbrev=False)
    ptm.add_argument("config", metavar="CONFIG.toml")
    ptm.add_argument("--out", metavar="DIR", help="replaces the file's out")
    ptm.add_argument("--seeds", type=int, nargs="+", metavar="N", help="replace the file's seeds")
    ptm.add_argument("--general", nargs="+", metavar="GLOB", help="text files of the general ability")
    ptm.add_argument(
        "--skill",
        action="append",
        metavar="NAME=GLOB",
        help="text files of a skill; may be repeated; NAME alone: the standard library's code, headers or arithmetic",
    )


def examples_verb(options: argparse.Namespace) -> int:
    """Report on what an expert memorised. Returns the exit status."""
    require_matplotlib(f"distmerge {options.verb}")
    from distmerge.experts import retention

    found = retention.report(Path(options.run_dir), options.merged, options.judge)
    retention.write(found, Path(options.out or options.run_dir))
    print(retention.table(found))
    return 0


def ptm_verb(options: argparse.Namespace) -> int:
    """Run the experiment. Returns the exit status."""
    require_matplotlib(f"distmerge {options.verb}")
    from distmerge.studies.config import read

    overrides: dict[str, Any] = {key: value for key in ("out", "seeds", "general") if (value := getattr(options, key))}
    if options.skill:
        overrides["skills"] = skills_of(options.skill)
    config = read(options.config, overrides)

    from distmerge.studies.ptm import experiment

    with quiet():
        results = experiment(config, train_one)
    print(json.dumps({"report": f"{config.out}/report.html", "results": f"{config.out}/results.json"} | results["summary"]))
    return 0


def skills_of(given: list[str]) -> dict[str, list[str]]:
    """The globs of each skill. A NAME alone gives ``[]``, which stands for the standard library's text of that name."""
    own: dict[str, list[str]] = {item: [] for item in given if "=" not in item}
    return own | globs_by_skill([item for item in given if "=" in item])
