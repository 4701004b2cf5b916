"""The state of a merger that another version wrote: refused in one line, with what to do."""

from __future__ import annotations

import copy
from typing import Any

import pytest

import distmerge as dm
from tests.ranks import Ranks
from tests.workers.test_streaming import build, train

ADVICE = "; resume with the version of distmerge that wrote it, or from a checkpoint written while no merge was in flight"


def merger_of(kind: str) -> Any:
    model = build("blocks")
    return dm.DiLoCo(model, every=4, overlap=2) if kind == "diloco" else dm.SPARTA(model, fraction=0.3, delay=2)


def states_of(kind: str) -> tuple[Any, dict[str, Any]]:
    """A merger, and its state while something is in flight."""
    merger = merger_of(kind)
    train(merger.flat.model, [merger], 5)
    return merger_of(kind), copy.deepcopy(merger.state_dict())


def loaded_without(part: str, key: str) -> str:
    """What is said when a diloco state lacks a key, in itself or in what is in flight."""
    merger, state = states_of("diloco")
    assert state["flying"] is not None
    del {"merger": state, "fragment": state["flying"], "divergence": state["flying"]["spread"]}[part][key]
    with pytest.raises(dm.UserError) as error:
        merger.load_state_dict(state)
    return str(error.value)


@pytest.mark.parametrize(
    ("part", "key", "where"),
    [
        ("merger", "residuals", "the state of a diloco merger"),
        ("fragment", "steps", "the fragment in flight"),
        ("divergence", "own_share", "the divergence of a fragment in flight"),
    ],
)
def test_a_state_without_a_key_is_refused_in_one_line(ranks: Ranks, part: str, key: str, where: str) -> None:
    said = f"the checkpoint was written by an incompatible version: in {where} it lacks {key}{ADVICE}"
    assert ranks.run(2, loaded_without, part, key) == [said, said]


def loaded_with_short_rounds() -> str:
    merger, state = states_of("sparta")
    state["rounds"] = [saved[:5] for saved in state["rounds"]]
    assert state["rounds"]
    with pytest.raises(dm.UserError) as error:
        merger.load_state_dict(state)
    return str(error.value)


def test_rounds_in_flight_of_another_layout_are_refused_in_one_line(ranks: Ranks) -> None:
    said = f"the checkpoint was written by an incompatible version: in a round in flight there are not 6 fields{ADVICE}"
    assert ranks.run(2, loaded_with_short_rounds) == [said, said]


def loads(kind: str) -> bool:
    merger, state = states_of(kind)
    merger.load_state_dict(state)
    return merger.round == state["round"]


@pytest.mark.parametrize("kind", ["diloco", "sparta"])
def test_a_state_of_this_version_loads_with_something_in_flight(ranks: Ranks, kind: str) -> None:
    assert ranks.run(2, loads, kind) == [True, True]
