"""Whose run a directory, or a checkpoint, is: a part of ``RUN_DIR/environment.json``, and in short of every manifest.

Imports no torch.

The run's id is drawn when it takes its first step. Nothing that is trained depends on it: two runs of one command end with the
same parameters. The text, the tokenizer and the models that a run began with are known by fingerprints, so that a resume on
others is refused and not silently another run.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import sysconfig
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from distmerge.config.train import Data, TrainConfig
from distmerge.data.sources import data_files, files_of
from distmerge.errors import UserError
from distmerge.files.fingerprints import differences, fingerprints
from distmerge.files.manifest import MANIFEST, hash_of, read_manifest
from distmerge.files.models import TOKENIZER_FILES

FILE = "environment.json"
KEY = "identity"
SHOWN = 3
"""Changed files that an error names; of the others it says how many they are."""


@dataclass(frozen=True)
class Identity:
    """Attributes:
    run: the run's id, 16 hexadecimal digits.
    seed: of its configuration.
    sources: what the run reads, by the key of the configuration: ``{"files": fingerprints}``, or ``{"hub": revision}``.
    forked_from: the id of the run whose checkpoint this one began with, if it did.
    """

    run: str
    seed: int
    sources: dict[str, dict[str, Any]]
    forked_from: str | None = None

    def said(self) -> dict[str, Any]:
        """What a manifest says of its run."""
        return {"run": self.run, "seed": self.seed, "sources": self._hashes}

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {key: hash_of(source) for key, source in self.sources.items()}

    def fork(self) -> Identity:
        """That of a run which begins with a checkpoint of this one."""
        return dataclasses.replace(self, run=secrets.token_hex(8), forked_from=self.run)

    def record(self) -> dict[str, Any]:
        """What environment.json says."""
        return {KEY: dataclasses.asdict(self)}


def read_identity(run_dir: Path) -> Identity | None:
    """The identity of a run that has taken a step; None for a directory without one, such as an older version's.

    Raises:
        UserError: where it cannot be read.
    """
    path = run_dir / FILE
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text()).get(KEY)
        return None if stored is None else Identity(**stored)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete it to go on without knowing whose checkpoints these are"
        ) from None


def identify(run_dir: Path, config: TrainConfig, claimed: bool) -> Identity:
    """The identity of the run that is started: the stored one, if the directory is ``claimed``, or a new one.

    Raises:
        UserError: naming what has changed of that which the run reads.
    """
    try:
        sources = sources_of(config)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None
    stored = read_identity(run_dir) if claimed else None
    if stored is None:
        return Identity(secrets.token_hex(8), config.seed, sources)
    for key, source in sources.items():
        changed = changes(stored.sources.get(key, source), source)
        if changed:
            more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
            raise UserError(
                f"config.{key} is not what the run in {run_dir} began with: {', '.join(changed[:SHOWN])}{more}; put it back, "
                "take another --run-dir, or begin anew with --restart"
            )
    return stored


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    if "files" in then and "files" in now:
        return differences(then["files"], now["files"])
    if then.keys() != now.keys():
        return ["it was on the hub" if "hub" in then else "it was on this machine"]
    if then["hub"] != now["hub"] and None not in (then["hub"], now["hub"]):
        return [f"its revision was {then['hub']} and is {now['hub']}"]
    return []


def sources_of(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Fingerprints of all that the run reads, by the key of the configuration that names it."""
    found = {"data": of_data(config.data)}
    if config.data.replay is not None:
        found["data.replay"] = of_files(files_of("config.data.replay.files", config.data.replay.files)[1])
    for name, section in config.stopping.skills.items():
        found[f"stopping.skills.{name}"] = of_data(section)
    if config.data.tokenizer != "bytes":
        found["data.tokenizer"] = of_directory(config.data.tokenizer, (*TOKENIZER_FILES, "config.json"))
    models = {"model.path": config.model.path, "expert.base": config.expert.base if config.expert else None}
    for key, name in models.items():
        if name is not None:
            found[key] = of_directory(name, ("*.safetensors", "*.safetensors.index.json", "config.json"))
    return found


def of_data(section: Data) -> dict[str, Any]:
    if section.source == "hub":
        assert section.dataset is not None
        return of_directory(section.dataset, ("**/*",), "dataset")
    _, files = data_files(section)
    return of_files(files, sysconfig.get_paths()["stdlib"] if section.source == "stdlib" else None)


def of_files(files: list[str], root: str | None = None) -> dict[str, Any]:
    return {"files": fingerprints({file if root is None else str(Path(file).relative_to(root)): Path(file) for file in files})}


def of_directory(name: str, patterns: tuple[str, ...], kind: str = "model") -> dict[str, Any]:
    """Of a directory, its files; of a hub id, the revision that lies in the hub's cache."""
    root = Path(name)
    if not root.is_dir():
        return {"hub": cached_revision(name, kind)}
    files = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    return {"files": fingerprints({path.relative_to(root).as_posix(): path for path in files})}


def cached_revision(name: str, kind: str) -> str | None:
    """The commit that the hub's cache holds as a repository's main branch, if it does."""
    from huggingface_hub import constants

    reference = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / "main"
    return reference.read_text().strip() if reference.is_file() else None


def stranger(path: Path, identity: Identity | None, name: str = MANIFEST) -> str | None:
    """Why a published directory, whose manifest is sound, is not of this run; None if it is, or if either does not say.

    Args:
        name: of the manifest.
    """
    if identity is None:
        return None
    manifest = read_manifest(path, name)
    if manifest.get("run") in (None, identity.run, identity.forked_from):
        return None
    theirs = f"it is of another run ({manifest['run']}, seed {manifest.get('seed')})"
    return f"{theirs}, this is run {identity.run}, seed {identity.seed}"
