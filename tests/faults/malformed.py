"""The table of malformed inputs, and the process that runs them: each case in a child of its own, forked and so cheap.

    python -m tests.faults.malformed SCRATCH

Light cases are answered before torch is loaded, in children of a process that has none; for the heavy ones it loads everything
once. A case makes its files in a folder of its own and gives the command's arguments and what the environment says. The cases
are in :mod:`tests.faults.malformed_config` and :mod:`tests.faults.malformed_inputs`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

from tests.experts import malformed as models
from tests.faults.malformed_config import CONFIGURATION, ENVIRONMENT, FREE, TAKEN, Case
from tests.faults.malformed_inputs import DATA, MODELS, RUNS, VERBS

CASES: dict[str, Case] = {
    f"{part}: {name}": case
    for part, table in (
        ("configuration", CONFIGURATION),
        ("environment", ENVIRONMENT),
        ("data", DATA),
        ("verbs", VERBS),
        ("models", MODELS),
        ("runs", RUNS),
    )
    for name, case in table.items()
}


def hashes(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("*") if path.is_file() and path.name != "said")
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def attempt(case: Case, root: Path, ports: dict[str, str]) -> dict[str, Any]:
    """What became of a case: its status, what it said, and what it did to the files that were there."""
    root.mkdir(parents=True)
    arguments = case.make(root)
    before = hashes(root)
    kept = dict(os.environ)
    os.environ.update({key: ports.get(value, value) for key, value in case.environment.items()})
    outcome = models.attempt(arguments, root)
    os.environ.clear()
    os.environ.update(kept)
    after = hashes(root)
    return outcome | {
        "harmed": [name for name in before if after.get(name) != before[name]],
        "made": [name for name in after if name not in before],
    }


def never_launch(ranks: int, arguments: list[str]) -> int:
    raise AssertionError(f"{ranks} ranks were launched")


def main(root: Path, only: str) -> None:
    import distmerge.launch.ranks

    distmerge.launch.ranks.launch = never_launch
    chosen = {name: case for name, case in CASES.items() if only in name}
    found = {}
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as free:
        ports = {TAKEN: str(taken.getsockname()[1]), FREE: str(free.getsockname()[1])}
        free.close()
        for heavy in (False, True):
            if heavy:
                import distmerge.merging.sweep
                import distmerge.trainer.loop
                import distmerge.windows.anneal
            for number, (name, case) in enumerate(chosen.items()):
                if case.heavy == heavy:
                    found[name] = attempt(case, root / str(number), ports)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "")
