"""How long training stands still for a merge that overlaps with it, beside the least that it must.

A merge needs its delta, the outer step and the new parameters in the training loop. Encoding, sending and decoding may run
meanwhile: only what they take longer than the overlapping steps is waited for. So the bound of a round is

    max(0, transfer - overlap * step) + what a merge of one worker with itself takes, without overlap,

where the transfer is the bytes of the round sent through the same group without encoding or reducing anything. ``wire.py``
prints the ratio of the seconds in ``merger.step()`` to this bound.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import on_ranks
from report import Report, spread
from sync import Vector, drift
from torch import Tensor

import distmerge as dm
from distmerge.workers.exchange import Transfer
from distmerge.workers.group import WorkerGroup
from distmerge.workers.wire import WIRES

NUMEL = 10_900_000
OVERLAP = 4
FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"wire": "int8"},
    "int4 with error feedback": {"wire": "int4", "error_feedback": True},
}
STEPS = {"long steps": 0.1, "short steps": 0.002}
"""Seconds of a step, which the device spends elsewhere: after long ones the transfer is over, after short ones it is not."""


def measure(rank: int, repetitions: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each round on one rank, by form and length of the steps: exposed, alone, and of the transfer."""
    torch.manual_seed(rank)
    groups: list[Any] = [dist.new_group([member]) for member in range(dist.get_world_size())]
    alone = merger(groups[rank], {})
    workers = WorkerGroup()
    found: dict[str, dict[str, list[float]]] = {}
    for form, keys in FORMS.items():
        shared, send = merger(None, keys | {"overlap": OVERLAP}), transfer(workers, WIRES[keys.get("wire", "fp32")])
        for name, step in STEPS.items():
            rounds: dict[str, list[float]] = {"exposed": [], "alone": [], "transfer": []}
            for _ in range(repetitions + 1):
                dist.barrier()
                rounds["transfer"].append(seconds(send))
                dist.barrier()
                rounds["alone"].append(one_round(alone, step))
                dist.barrier()
                rounds["exposed"].append(one_round(shared, step))
            found[f"{form}, {name}"] = {key: values[1:] for key, values in rounds.items()}  # the first one touches the memory
    return found


def merger(group: dist.ProcessGroup | None, keys: dict[str, Any]) -> dm.DiLoCo:
    return dm.DiLoCo(Vector(NUMEL, "cpu"), every=OVERLAP + 1, group=group, **keys)


def one_round(merger: dm.DiLoCo, step: float) -> float:
    """Seconds inside ``merger.step()`` over the steps of a round: one that sends, and those until the result is applied."""
    exposed = 0.0
    for _ in range(OVERLAP + 1):
        time.sleep(step)
        if merger.due():
            drift(merger.flat.vector)
        exposed += seconds(merger.step)
    return exposed


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def transfer(workers: WorkerGroup, wire: Any) -> Callable[[], None]:
    """A function that sends what a merge sends, and nothing else."""
    if wire.name == "fp32":
        values = torch.ones(NUMEL)

        def all_reduce() -> None:
            dist.all_reduce(values)

        return all_reduce
    share = wire.size_bytes(NUMEL // workers.size // 64 * 64)
    rows: list[Tensor] = [torch.ones(share, dtype=torch.uint8) for _ in range(2 * workers.size)]

    def both_halves() -> None:
        for _ in range(2):
            mine, theirs = rows[: workers.size], rows[workers.size :]
            Transfer(workers, list(enumerate(mine)), list(enumerate(theirs)), 0).wait()

    return both_halves


def judge_exposed(report: Report, repetitions: int) -> None:
    """The bars of ``wire.py``; a round is as long as on its slowest rank."""
    results = on_ranks(measure, 2, repetitions)
    for case in results[0]:
        step = STEPS[case.rpartition(", ")[2]]
        on_all = [result[case] for result in results]
        slowest = {key: [max(turn) for turn in zip(*(one[key] for one in on_all), strict=True)] for key in on_all[0]}
        bounds = [max(0.0, t - OVERLAP * step) + a for t, a in zip(slowest["transfer"], slowest["alone"], strict=True)]
        ratio = spread([exposed / bound for exposed, bound in zip(slowest["exposed"], bounds, strict=True)])
        report.data[f"exposed, {case}"] = {key: spread(values) for key, values in slowest.items()} | {"over the bound": ratio}
        report.bar(f"seconds exposed by an overlapping merge over their bound, {case}", ratio["median"], "<=", 1.0)
