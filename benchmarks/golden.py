"""Golden numbers: what small runs and merges give, to the bit, so that a redesign that moves one shows it.

    python benchmarks/golden.py             # everything again, held against benchmarks/records/golden.json
    python benchmarks/golden.py --record    # keep what came out as the new golden numbers

A run gives the SHA-256 of its final weights and its logged losses; a merge the SHA-256 of its weights. They repeat on one
machine with one thread. On another platform the losses may differ in the last digits, and then the hashes do: the record says
on which machine it was taken, and losses that differ by less than 1e-4 are called near.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tomli_w
import yaml
from golden_cases import EXPERTS, PAPER, RECIPES, RUNS, Case, write_models, write_text
from report import RECORDS, Report, parser

NEAR = 1e-4


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def distmerge(arguments: list[str], log: Path) -> str | None:
    """Run a command with one thread; the end of what it said where it failed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with open(log, "w") as file:
        command = [sys.executable, "-m", "distmerge", *arguments]
        status = subprocess.run(command, stdout=file, stderr=file, env=environment).returncode
    return f"status {status}: {log.read_text()[-1000:]}" if status else None


def trained(folder: Path, name: str, case: Case, start: Path | None = None) -> dict[str, Any]:
    """What a run gives."""
    place = name.replace(" ", "-").replace(",", "")
    config = case.config(folder, place)
    if start is not None:
        config["model"] = {"path": str(start)}
    path = folder / f"{place}.toml"
    path.write_text(tomli_w.dumps(config))
    if failure := distmerge(["train", str(path), "--ranks", str(case.ranks)], folder / f"{place}.log"):
        return {"failed": failure}
    run = folder / place
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("train/loss", "eval/loss", "preview/loss")
    losses = [line[key] for line in lines for key in keys if key in line]
    weights = next((run / "final").glob("*.safetensors"))
    return {"weights": sha256(weights), "losses": losses}


def merged(folder: Path, name: str, compat: str) -> dict[str, Any]:
    """What a merge gives: a recipe of mergekit's in YAML, or in our own notation, whose form is the paper's."""
    place = folder / f"{name.replace(' ', '-').replace(',', '')}-{compat}"
    recipe = placed(RECIPES[name], folder)
    path = place.with_suffix(".yaml" if compat == "mergekit" else ".toml")
    path.write_text(yaml.safe_dump(recipe) if compat == "mergekit" else tomli_w.dumps(native(recipe)))
    if failure := distmerge(["merge", str(path), "--out", str(place), "--threads", "1"], place.with_suffix(".log")):
        return {"failed": failure}
    return {"weights": sha256(place / "model.safetensors")}


def placed(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The recipe with the models' places in place of their names."""
    models = [entry | {"model": str(folder / entry["model"])} for entry in recipe["models"]]
    base = {"base_model": str(folder / recipe["base_model"])} if "base_model" in recipe else {}
    return recipe | {"models": models} | base


def native(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe in our own notation."""
    models = [{"path": entry["model"]} | entry["parameters"] for entry in recipe["models"]]
    base = {"base": recipe["base_model"]} if "base_model" in recipe else {}
    return {"method": recipe["merge_method"]} | base | recipe.get("parameters", {}) | {"model": models}


def compared(ours: dict[str, Any], golden: dict[str, Any] | None) -> str:
    """ "equal", "near" (losses within 1e-4 of each other), "differs", "failed" or "new"."""
    if "failed" in ours:
        return "failed"
    if golden is None:
        return "new"
    if ours == golden:
        return "equal"
    mine, theirs = ours.get("losses", []), golden.get("losses", [])
    alike = mine and len(mine) == len(theirs) and all(abs(a - b) <= NEAR for a, b in zip(mine, theirs, strict=True))
    return "near" if alike else "differs"


def main() -> None:
    report = Report("golden", parser(__doc__).parse_args())
    record = RECORDS / "golden.json"
    golden: dict[str, Any] = json.loads(record.read_text())["data"]["numbers"] if record.exists() else {}
    with tempfile.TemporaryDirectory(dir=report.out) as temporary:
        folder = Path(temporary).resolve()
        write_text(folder / "text.txt")
        write_models(folder)
        found: dict[str, Any] = {}
        for name, case in RUNS.items():
            found[f"run: {name}"] = trained(folder, name, case)
        for name, case in EXPERTS.items():
            found[f"run: {name}"] = trained(folder, name, case, folder / "one-worker" / "final")
        for name in RECIPES:
            found[f"merge: {name}"] = merged(folder, name, "mergekit")
        for name in PAPER:
            found[f"merge: {name}, the paper's form"] = merged(folder, name, "paper")
    verdicts = {name: compared(numbers, golden.get(name)) for name, numbers in found.items()}
    for name, verdict in verdicts.items():
        report.say(f"{verdict:8}{name}" + (f": {found[name]['failed']}" if verdict == "failed" else ""))
    report.data |= {"numbers": found, "verdicts": verdicts}
    moved = sum(verdict in ("differs", "failed", "near") for verdict in verdicts.values())
    report.bar("golden numbers that moved", moved, "<=", 0)
    report.finish()


if __name__ == "__main__":
    main()
