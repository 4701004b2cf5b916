"""The identity of a run: it says which run a directory or a checkpoint belongs to. Imports no torch.

It is stored in ``RUN_DIR/environment.json`` and, in short form, in every manifest. The run's id is drawn when it takes its
first step. Training does not depend on it: two runs of one command end with the same parameters. The identity also holds
fingerprints of the text, the tokenizer and the models that the run began with, so that resuming with others is refused instead
of silently continuing as another run.
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
"""The number of changed files that an error names; the others are only counted."""


@dataclass(frozen=True)
class Identity:
    """The identity of a run.

    Attributes:
        run: the run's id, 16 hexadecimal digits.
        seed: of its configuration.
        sources: for each key of the configuration that names something to read, ``{"files": fingerprints}`` or
            ``{"hub": revision}``.
        forked_from: the id of the run whose checkpoint this one began with, if it is a fork.
    """

    run: str
    seed: int
    sources: dict[str, dict[str, Any]]
    forked_from: str | None = None

    def manifest_entries(self) -> dict[str, Any]:
        """The entries about the run for a manifest."""
        return {"run": self.run, "seed": self.seed, "sources": self._hashes}

    @cached_property
    def _hashes(self) -> dict[str, str]:
        return {key: hash_of(source) for key, source in self.sources.items()}

    def fork(self) -> Identity:
        """The identity of a new run that begins with a checkpoint of this one."""
        return dataclasses.replace(self, run=secrets.token_hex(8), forked_from=self.run)

    def record(self) -> dict[str, Any]:
        """The entry for environment.json."""
        return {KEY: dataclasses.asdict(self)}


def read_identity(run_dir: Path) -> Identity | None:
    """The identity of the run that owns a directory; None if it has none, as in directories of older versions.

    Raises:
        UserError: if it cannot be read.
    """
    path = run_dir / FILE
    if not path.exists():
        return None
    try:
        stored = json.loads(path.read_text()).get(KEY)
        return None if stored is None else Identity(**stored)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete it to go on without a check of which run the checkpoints belong to"
        ) from None


def identify(run_dir: Path, config: TrainConfig, claimed: bool) -> Identity:
    """The identity of the run that is being started: the stored one if the directory is ``claimed``, else a new one.

    Raises:
        UserError: if files that the run reads have changed, naming them, or cannot be read.
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
                "take another --run-dir, or start from scratch with --restart"
            )
    return stored


def changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two fingerprints of one source, in words; empty if nothing does."""
    if "files" in then and "files" in now:
        return differences(then["files"], now["files"])
    if then.keys() != now.keys():
        return ["it was read from the hub" if "hub" in then else "it was read from this machine"]
    if then["hub"] != now["hub"] and None not in (then["hub"], now["hub"]):
        return [f"its revision was {then['hub']} and is {now['hub']}"]
    return []


def sources_of(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Fingerprints of everything that the run reads, by the key of the configuration that names it."""
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
    """The fingerprint of a data section's files, or of its dataset on the hub."""
    if section.source == "hub":
        assert section.dataset is not None
        return of_directory(section.dataset, ("**/*",), "dataset")
    _, files = data_files(section)
    return of_files(files, sysconfig.get_paths()["stdlib"] if section.source == "stdlib" else None)


def of_files(files: list[str], root: str | None = None) -> dict[str, Any]:
    """The fingerprints of files, by their paths: relative to ``root`` if that is given."""
    return {"files": fingerprints({file if root is None else str(Path(file).relative_to(root)): Path(file) for file in files})}


def of_directory(name: str, patterns: tuple[str, ...], kind: str = "model") -> dict[str, Any]:
    """For a directory the fingerprints of its files; for an id on the hub the revision in the hub's cache."""
    root = Path(name)
    if not root.is_dir():
        return {"hub": cached_revision(name, kind)}
    files = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    return {"files": fingerprints({path.relative_to(root).as_posix(): path for path in files})}


def cached_revision(name: str, kind: str) -> str | None:
    """The commit of a repository's main branch in the hub's cache; None if it is not cached."""
    from huggingface_hub import constants

    reference = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}" / "refs" / "main"
    return reference.read_text().strip() if reference.is_file() else None


def identity_problem(path: Path, identity: Identity | None, name: str = MANIFEST) -> str | None:
    """Why a published directory does not belong to this run. None if it does, or if the run or the manifest has no identity.

    Args:
        path: of the directory, whose manifest must be readable.
        name: of the manifest.
    """
    if identity is None:
        return None
    manifest = read_manifest(path, name)
    if manifest.get("run") in (None, identity.run, identity.forked_from):
        return None
    theirs = f"it is of another run ({manifest['run']}, seed {manifest.get('seed')})"
    return f"{theirs}, this is run {identity.run}, seed {identity.seed}"
