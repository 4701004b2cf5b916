"""One rank, in this process: hundreds of faults in seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from distmerge.config import train as config
from distmerge.launch.ranks import Place
from distmerge.mesh import Mesh


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", "0")
        patch.setenv("RANK", "0")
        patch.setenv("WORLD_SIZE", "1")
        alone = Mesh(config.MeshSettings(device="cpu"), Place(0, 1, 0, 1), threads=None)
        yield alone
        alone.close()


@pytest.fixture(autouse=True)
def instant_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a crash leaves of the unsynced is modelled by the faulty disk; waiting for the real one would add minutes."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
