"""A SPARTA round of 30M parameters on 4 ranks: computed indices and one collective, against masks that travel.

The other side is the published implementation's way, written here: for each tensor rank 0 draws a Bernoulli mask and
broadcasts it whole, every rank gathers the masked values, all-reduces them and scatters them back. Both are measured in turns.

    python benchmarks/sparta.py [--small] [--out DIR] [--record]
"""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from report import Report, parser, spread
from torch import Tensor, nn

import distmerge as dm

RANKS = 4
FRACTION = 0.005


def transformer(layers: int = 12, width: int = 448) -> nn.Module:
    """30M parameters in the tensors of a Llama of 12 layers: about a hundred."""
    inner = 8 * width // 3
    shapes: list[tuple[int, ...]] = [(5000, width), (width,)]
    for _ in range(layers):
        shapes += [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)] + [(width,)] * 2
    return nn.ParameterList(nn.Parameter(0.02 * torch.randn(shape)) for shape in shapes)


@torch.no_grad()
def masked_round(parameters: list[Tensor]) -> int:
    """One round with a mask for each tensor; the bytes of its payload."""
    payload = 0
    for parameter in parameters:
        mask = torch.bernoulli(torch.full(parameter.shape, FRACTION)).bool()
        dist.broadcast(mask, src=0)
        values = parameter[mask]
        dist.all_reduce(values)
        parameter[mask] = values / dist.get_world_size()
        payload += mask.numel() + 4 * values.numel()
    return payload


def measure(rank: int, repetitions: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = transformer()
    parameters = [p.data for p in model.parameters()]
    mergers = {wire: dm.SPARTA(model, fraction=FRACTION, wire=wire) for wire in ("fp32", "bf16")}
    numel = mergers["fp32"].flat.vector.numel()
    seconds: dict[str, list[float]] = {"fp32": [], "bf16": [], "masks": []}
    facts: dict[str, Any] = {"numel": numel, "tensors": len(parameters)}
    for repetition in range(repetitions + 1):
        for name in seconds:
            dist.barrier()
            began = time.perf_counter()
            if name == "masks":
                facts["masks"] = {"payload": masked_round(parameters) / numel, "collectives": 2 * len(parameters)}
            else:
                ledger = mergers[name].workers.ledger
                collectives, payload = ledger.collectives, ledger.payload_bytes
                mergers[name].step()
                facts[name] = {
                    "payload": (ledger.payload_bytes - payload) / numel,
                    "collectives": ledger.collectives - collectives,
                }
            if repetition:
                seconds[name].append(time.perf_counter() - began)
    return {"seconds": seconds} | facts


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("sparta", options)
    results = on_ranks(measure, RANKS, 3 if options.small else 9)
    slowest = {
        name: [max(turn) for turn in zip(*(r["seconds"][name] for r in results), strict=True)] for name in results[0]["seconds"]
    }
    medians = {name: spread(values)["median"] for name, values in slowest.items()}
    facts = {name: results[0][name] for name in ("numel", "tensors", "fp32", "bf16", "masks")}
    report.data |= facts | {"ranks": RANKS, "seconds": {name: spread(values) for name, values in slowest.items()}}
    report.bar("payload of a round in bytes per parameter, fp32", facts["fp32"]["payload"], "<=", 0.0202)
    report.bar("payload of a round in bytes per parameter, bf16", facts["bf16"]["payload"], "<=", 0.0101)
    report.bar("collectives of a round, fp32", facts["fp32"]["collectives"], "<=", 1)
    report.bar("speed of a round against masks that travel, fp32", medians["masks"] / medians["fp32"], ">=", 25)
    report.finish()


if __name__ == "__main__":
    main()
