"""Seeded kills of a run with everything on at once: does it end with the bytes of a run that nobody killed?

Commits in a thread, recovery, window, previews, streaming int4 merges with error feedback and overlap, delayed sparse merges;
SIGKILL of all ranks, of one, of the launcher, and of all in a commit, at seeded moments.

    python benchmarks/kills.py [--small] [--seeds N] [--out DIR] [--record]
"""

from __future__ import annotations

import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from report import Report, parser

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.faults.kills import campaign


def main() -> None:
    options = parser(__doc__, seeds=1).parse_args()
    report = Report("kills", options)
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    kills = 4 if options.small else 40
    results = []
    for seed in range(options.seeds):
        folder = report.out / f"seed-{seed}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        results.append(campaign(folder, kills, seed))
        report.say(f"seed {seed}: {len(results[-1]['kills'])} kills in {results[-1]['runs']} runs")
        shutil.rmtree(folder)
    report.data["campaigns"] = results
    report.data["victims"] = Counter(entry["victim"] for result in results for entry in result["kills"])
    report.bar("kills", sum(len(result["kills"]) for result in results), ">=", kills * options.seeds)
    report.bar("killed runs that differ from the uninterrupted one", sum(len(r["differing"]) for r in results), "<=", 0)
    report.finish()


if __name__ == "__main__":
    main()
