"""The mergers that a configuration asks for."""

from __future__ import annotations

import inspect
import sys

from distmerge.config import mergers as sections
from distmerge.config import plugins
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.mesh import Mesh
from distmerge.theta.flat import FlatParameters
from distmerge.workers.diloco import DiLoCo
from distmerge.workers.merger import Merger, check_merger
from distmerge.workers.sparta import SPARTA


def build_mergers(config: TrainConfig, flat: FlatParameters, mesh: Mesh) -> list[Merger]:
    """A merger for each [[merge]] entry, over the ranks that hold the same shard as this one."""
    mergers: list[Merger] = []
    for index, entry in enumerate(config.merge):
        settings = entry.model_dump(exclude={"kind"})
        try:
            match entry:
                case sections.DiLoCoSettings():
                    mergers.append(DiLoCo(flat, **settings, group=mesh.peers))
                case sections.AverageSettings():
                    mergers.append(DiLoCo(flat, **settings, outer_lr=1.0, outer_momentum=0.0, group=mesh.peers))
                case sections.SPARTASettings():
                    mergers.append(SPARTA(flat, **settings, seed=config.seed, group=mesh.peers))
                case sections.NoMergeSettings():
                    mergers.append(DiLoCo(flat, every=sys.maxsize, outer_lr=1.0, outer_momentum=0.0, group=mesh.peers))
                case sections.CustomSettings():
                    mergers.append(outside(entry, flat, mesh))
        except UserError as error:
            raise UserError(f"config.merge[{index}]: {error}") from None
    return mergers


def outside(entry: sections.CustomSettings, flat: FlatParameters, mesh: Mesh) -> Merger:
    """A merger from outside this package, made with the keys of its table.

    Raises:
        UserError: for a class that is not loaded, is not a merger, or does not accept these keys.
    """
    made = plugins.loaded(entry.kind)
    if missing := sorted(getattr(made, "__abstractmethods__", ())):
        raise UserError(f"kind {entry.kind!r} must be a merger (see distmerge.Merger), but it has no {', '.join(missing)}")
    try:
        inspect.signature(made).bind(flat, group=mesh.peers, **entry.arguments)
    except TypeError as error:
        raise UserError(f"kind {entry.kind!r}: {error}; it is called with the parameters, group and the table's keys") from None
    return check_merger(made(flat, group=mesh.peers, **entry.arguments), f"kind {entry.kind!r}")


def notes(config: TrainConfig) -> list[str]:
    """Warnings about the mergers that the user should see before the run starts."""
    found = [(index, entry.warning(config.steps)) for index, entry in enumerate(config.merge)]
    return [f"config.merge[{index}]: {warning}" for index, warning in found if warning is not None]
