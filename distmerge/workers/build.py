"""The mergers that a configuration asks for."""

from __future__ import annotations

import sys

from distmerge.config import mergers as sections
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.mesh import Mesh
from distmerge.theta.flat import FlatParameters
from distmerge.workers.diloco import DiLoCo
from distmerge.workers.sparta import SPARTA


def build_mergers(config: TrainConfig, flat: FlatParameters, mesh: Mesh) -> list[DiLoCo | SPARTA]:
    """A merger for each [[merge]] entry, among this rank's peers."""
    mergers: list[DiLoCo | SPARTA] = []
    for index, entry in enumerate(config.merge):
        settings = entry.model_dump(exclude={"kind"})
        try:
            match entry:
                case sections.DiLoCo():
                    mergers.append(DiLoCo(flat, **settings, group=mesh.peers))
                case sections.Average():
                    mergers.append(DiLoCo(flat, **settings, outer_lr=1.0, outer_momentum=0.0, group=mesh.peers))
                case sections.SPARTA():
                    mergers.append(SPARTA(flat, **settings, seed=config.seed, group=mesh.peers))
                case sections.NoMerge():
                    mergers.append(DiLoCo(flat, every=sys.maxsize, outer_lr=1.0, outer_momentum=0.0, group=mesh.peers))
        except UserError as error:
            raise UserError(f"config.merge[{index}]: {error}") from None
    return mergers


def notes(config: TrainConfig) -> list[str]:
    """What the user should know of the mergers before the run starts."""
    found = [(index, entry.warning(config.steps)) for index, entry in enumerate(config.merge)]
    return [f"config.merge[{index}]: {warning}" for index, warning in found if warning is not None]
