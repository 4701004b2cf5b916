"""A run's claim on its directory, which its first step makes, and not its start.

A configuration that fails before the first step must not block the directory for the corrected one. Until the claim nothing in
the directory says which run owns it; that no other job uses it at the same time is ensured by the lock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from distmerge.config.train import TrainConfig
from distmerge.files.directories import guarded
from distmerge.mesh import Mesh
from distmerge.rundir.identity import Identity, identify
from distmerge.rundir.layout import RunDirectory


class Claim:
    """A run's claim on its directory.

    Args:
        command: the command that started the run, for the record.

    Attributes:
        identity: the run's identity, on the lead rank; None on the others.

    Raises:
        UserError: if the directory belongs to a run that began with other data, another tokenizer or another model.
    """

    def __init__(self, directory: RunDirectory, config: TrainConfig, mesh: Mesh, command: Sequence[str]):
        self.directory, self.config, self.mesh, self.command = directory, config, mesh, list(command)
        self.taken = False
        self.identity: Identity | None = None
        with mesh.raise_on_all_ranks():
            if mesh.leads:
                self.identity = identify(directory.path, config, directory.claimed)

    def take(self) -> None:
        """Claim the directory: write the run's configuration and identity, once per start. A collective."""
        if self.taken:
            return
        self.taken = True
        with self.mesh.raise_on_all_ranks():
            if self.identity is not None:
                guarded(self.directory.path, self._write)

    def _write(self) -> None:
        assert self.identity is not None
        self.directory.begin(self.config, self.command, self.identity.record())

    def manifest_entries(self) -> dict[str, Any]:
        """The entries about the run for a manifest, on the rank that writes it; empty on the others."""
        return {} if self.identity is None else self.identity.manifest_entries()
