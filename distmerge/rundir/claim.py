"""Whose run directory it is: claimed by a run's first step, and not before.

A configuration that cannot even begin must not keep the directory from the one that is put right. Until then nothing in it
says whose it is; that no other job uses it is the lock's business.
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
        command: that started the run, for the record.

    Attributes:
        identity: of the run, on the rank that writes it; None on the others.

    Raises:
        UserError: where the directory belongs to a run that read something else.
    """

    def __init__(self, directory: RunDirectory, config: TrainConfig, mesh: Mesh, command: Sequence[str]):
        self.directory, self.config, self.mesh, self.command = directory, config, mesh, list(command)
        self.taken = False
        self.identity: Identity | None = None
        with mesh.raise_on_all_ranks():
            if mesh.leads:
                self.identity = identify(directory.path, config, directory.claimed)

    def take(self) -> None:
        """Write down what runs here, once per start. A collective."""
        if self.taken:
            return
        self.taken = True
        with self.mesh.raise_on_all_ranks():
            if self.identity is not None:
                guarded(self.directory.path, self._write)

    def _write(self) -> None:
        assert self.identity is not None
        self.directory.begin(self.config, self.command, self.identity.record())

    def said(self) -> dict[str, Any]:
        """What a manifest says of the run, on the rank that writes it."""
        return {} if self.identity is None else self.identity.said()
