"""Every merger with every engine: one anchor on all ranks, masters that were really written, bytes by the shard."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.cases import ENGINES, many, merge_and_look, train_plainly
from tests.ranks import Ranks

deepspeed = pytest.importorskip("deepspeed")


CASES = [
    *((engine, merger, "float32") for engine in ENGINES for merger in ("diloco", "sparta", "streaming int8")),
    *((engine, "sharded outer", "float32") for engine in ("fsdp", "zero 2")),
    *((engine, "diloco", "bfloat16") for engine in ENGINES if engine != "torch"),
]


@pytest.fixture(scope="module")
def seen() -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """What the ranks of each case saw, first those of 2 x 2, then those of 2 x 1.

    In ranks of our own: DeepSpeed counts modules per process, and ZeRO 3 wants the counts to agree between ranks, so that
    worlds must not grow while the processes live.
    """
    work = [(merge_and_look, (ENGINES[engine], merger, precision)) for engine, merger, precision in CASES]
    work += [(train_plainly, (engine,)) for engine in ENGINES.values()]
    keys = [*CASES, *ENGINES]
    found = {}
    ranks = Ranks()
    for world in (4, 2):
        answers = ranks.run(world, many, work, group=False)
        for index, key in enumerate(keys):
            found[(world, key)] = [answer[index] for answer in answers]
    ranks.close()
    return found


@pytest.mark.parametrize("case", CASES, ids=" ".join)
@pytest.mark.parametrize("world", [4, 2], ids=["2x2", "2x1"])
def test_one_anchor_that_survives_a_step(seen: dict, world: int, case: tuple[str, str, str]) -> None:
    results = seen[(world, case)]
    losses = {result["merged"][0] for result in results}
    assert len(losses) == 1, "after a full merge every rank computes with the same model"
    shards = {}
    for result in results:
        shards.setdefault(result["place"][1], set()).add(result["merged"][1])
    assert all(len(bits) == 1 for bits in shards.values()), "peers hold the same bits"
    leaders = [result["theta"] for result in results if result["theta"]]
    for name, tensor in leaders[0].items():
        assert all(torch.equal(tensor, other[name]) for other in leaders), name
    for result in results:
        assert result["stepped"] == result["merged"], "a step of length zero must find the merged values in the masters"
        assert result["losses"][-1] < result["losses"][0] - 0.1, result["losses"]
        assert result["notes"] == []


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_ranks_traffic_is_its_shard(seen: dict, case: tuple[str, str, str]) -> None:
    alone = seen[(2, case)][0]["bytes"]
    beside = 320 * seen[(4, case)][0]["rounds"]  # scalars, uneven shards, int8's blocks of 64 values on each of the peers
    for result in seen[(4, case)]:
        assert result["bytes"] == pytest.approx(alone / 2, abs=beside)


@pytest.mark.parametrize("engine", list(ENGINES)[1:])
@pytest.mark.parametrize("world", [4, 2], ids=["2x2", "2x1"])
def test_engines_agree_with_torch(seen: dict, world: int, engine: str) -> None:
    expected, other = seen[(world, "torch")][0], seen[(world, engine)][0]
    assert expected["round"] == 2
    torch.testing.assert_close(other["seen"], expected["seen"], rtol=0, atol=1e-5)
    for key, tensor in expected["theta"].items():
        torch.testing.assert_close(other["theta"][key], tensor, rtol=0, atol=1e-5)
