"""The wire's formats, and the exchange that they travel in, against plain references."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distmerge.workers.exchange import Exchange
from distmerge.workers.group import WorkerGroup
from distmerge.workers.wire import BLOCK, WIRES
from tests.ranks import Ranks


def plainly(values: Tensor, levels: int) -> Tensor:
    """Block quantisation, one block at a time."""
    blocks = []
    for block in values.split(BLOCK):
        scale = block.abs().max() / levels
        blocks.append(torch.zeros_like(block) if scale == 0 else torch.round(block / scale) * scale)
    return torch.cat(blocks)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("numel", [64, 640, 64 * 33])
def test_quantised_formats_are_the_plain_ones(name: str, numel: int) -> None:
    values = torch.randn(numel) * torch.logspace(-8, 3, numel)
    values[:64] = 0
    wire = WIRES[name]
    message = wire.encode(values)
    assert message.dtype == torch.uint8 and message.numel() == wire.size_bytes(numel)
    torch.testing.assert_close(wire.decode(message, numel), plainly(values, wire.levels), rtol=0, atol=0)


@pytest.mark.parametrize("name", WIRES)
def test_rows_are_encoded_one_by_one(name: str) -> None:
    values = torch.randn(3, 128)
    wire = WIRES[name]
    message = wire.encode(values)
    assert message.shape == (3, wire.size_bytes(128))
    for row in range(3):
        assert torch.equal(message[row], wire.encode(values[row]))
    assert torch.equal(wire.decode(message, 128), torch.stack([wire.decode(row, 128) for row in message]))


def test_sizes() -> None:
    sizes = {name: wire.size_bytes(6400) / (4 * 6400) for name, wire in WIRES.items()}
    assert sizes["fp32"] == 1 and sizes["bf16"] == 0.5
    assert sizes["int8"] <= 0.27 and sizes["int4"] <= 0.15


def exchange(name: str, numel: int, weights: list[float], rounds: int) -> tuple[list[Tensor], list[Tensor], tuple[int, float]]:
    """Messages and results of ``rounds`` exchanges of the same values, with error feedback."""
    workers = WorkerGroup()
    torch.manual_seed(dist.get_rank())
    own = torch.randn(numel)
    share = -(-numel // (workers.size * BLOCK)) * BLOCK
    residual = (torch.zeros(workers.size * share), torch.zeros(share)) if rounds > 1 else None
    results = []
    for _ in range(rounds):
        message = torch.cat([own, torch.zeros(1)])
        pending = Exchange(workers, message, weights[workers.rank], WIRES[name], residual)
        pending.advance()
        pending.finish()
        results.append(message[:-1] / message[-1])
    return [own], results, (workers.ledger.collectives, workers.ledger.bytes_sent)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("numel", [1, 63, 64, 1001])
@pytest.mark.parametrize(("name", "tolerance"), [("fp32", 1e-6), ("bf16", 0.02), ("int8", 0.03), ("int4", 0.5)])
def test_an_exchange_is_a_weighted_mean(ranks: Ranks, world: int, numel: int, name: str, tolerance: float) -> None:
    weights = [1.0, 3.0, 0.0, 2.0][:world]
    results = ranks.run(world, exchange, name, numel, weights, 1)
    values = torch.stack([own[0] for own, _, _ in results])
    expected = (values * torch.tensor(weights).view(-1, 1)).sum(0) / sum(weights)
    share = -(-numel // (world * BLOCK)) * BLOCK
    for _, (merged,), (collectives, sent) in results:
        assert torch.equal(merged, results[0][1][0])
        torch.testing.assert_close(merged, expected, rtol=0, atol=tolerance)
        size = world * WIRES[name].size_bytes(share)
        assert collectives == 2 and (name == "fp32" or sent == (2 * size + 4 * world) * (world - 1) / world)
    exact = 4 * (2 * numel + world) * (world - 1)  # float32 is not padded to whole blocks
    assert name != "fp32" or sum(sent for _, _, (_, sent) in results) == exact


def test_error_feedback_makes_up_for_rounding(ranks: Ranks) -> None:
    """The mean of many rounds of the same values comes near the values; without feedback the error would stay."""
    results = ranks.run(2, exchange, "int4", 1001, [1.0, 1.0], 64)
    expected = torch.stack([own[0] for own, _, _ in results]).mean(0)
    _, rounds, _ = results[0]
    once, many = (rounds[0] - expected).norm(), (torch.stack(rounds).mean(0) - expected).norm()
    assert many < once / 20
