"""DiLoCo on real ranks, against K stacked workers in one process and against its own identities."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmerge as dm
from tests.ranks import Ranks
from tests.workers.loops import STEPS, build, inner, loss_of, run_diloco, train, vector_of


def reference(world: int, kind: str, options: dict[str, Any], optimizer_name: str = "adamw", steps: int = STEPS) -> Tensor:
    """K stacked workers in one process; the outer step is torch.optim.SGD's, in float64, on minus the mean delta. A part of a
    round at the end is closed with the mean of the workers."""
    torch.manual_seed(0)
    models = [build(kind)]
    models += [copy.deepcopy(models[0]) for _ in range(world - 1)]
    optimizers = [inner(optimizer_name, model) for model in models]
    anchor = nn.Parameter(vector_of(models[0]).double())
    lr, momentum = options.get("outer_lr", 0.7 if world < 4 else 1.0), options.get("outer_momentum", 0.5)
    nesterov = bool(options.get("nesterov", True) and momentum)
    outer = torch.optim.SGD([anchor], lr=lr, momentum=momentum, nesterov=nesterov)
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            train(model, optimizer, rank, step)
        stacked = torch.stack([vector_of(model).double() for model in models])
        whole = (step + 1) % options["every"] == 0
        if whole:
            anchor.grad = -(stacked - anchor.detach()).sum(0) / world
            outer.step()
        elif step + 1 == steps:
            anchor.data = stacked.sum(0) / world
        if whole or step + 1 == steps:
            for model in models:
                nn.utils.vector_to_parameters(anchor.detach().float(), model.parameters())
    return anchor.detach()


# ---- against the reference


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("optimizer_name", ["sgd", "adamw"])
def test_equals_stacked_workers_in_one_process(ranks: Ranks, world: int, optimizer_name: str) -> None:
    options = {"every": 4, "outer_lr": 0.7, "outer_momentum": 0.9}
    results = ranks.run(world, run_diloco, "deep", options, optimizer_name)
    expected = reference(world, "deep", options, optimizer_name)
    for result in results:
        torch.testing.assert_close(result["theta"].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(result["theta"], results[0]["theta"])
        assert torch.equal(result["anchor"], result["theta"])


@pytest.mark.parametrize(
    "options",
    [
        {"outer_lr": 0.7, "outer_momentum": 0.9, "nesterov": False},
        {"outer_lr": 0.4, "outer_momentum": 0.0},
        {"outer_lr": 1.0, "outer_momentum": 0.5},
        {"outer_lr": 1.0, "outer_momentum": 0.0},
    ],
    ids=str,
)
def test_other_outer_optimizers(ranks: Ranks, options: dict[str, Any]) -> None:
    options = options | {"every": 4}
    expected = reference(3, "deep", options)
    for result in ranks.run(3, run_diloco, "deep", options):
        torch.testing.assert_close(result["theta"].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["one", "deep", "wide"])
@pytest.mark.parametrize("bucket_floats", [9, 4096, 70_000, 16 * 2**20])
def test_any_bucket_serves_any_size(ranks: Ranks, kind: str, bucket_floats: int) -> None:
    """Vectors smaller and larger than a bucket, of which it is no divisor; pieces smaller and larger than a bucket."""
    if kind == "wide" and bucket_floats == 9:
        pytest.skip("10,000 collectives a merge say nothing more")
    options = {"every": 4, "bucket_bytes": 4 * bucket_floats + 3}
    results = ranks.run(2, run_diloco, kind, options)
    expected = reference(2, kind, options)
    numel = expected.numel()
    for result in results:
        torch.testing.assert_close(result["theta"].double(), expected, rtol=0, atol=1e-6)
        assert torch.equal(result["theta"], results[0]["theta"])
        for report in filter(None, result["reports"]):
            assert report.collectives == math.ceil(numel / bucket_floats) + 1  # and one of scalars


def test_a_bucket_of_one_float(ranks: Ranks) -> None:
    fine, coarse = (ranks.run(2, run_diloco, "deep", {"every": 4, "bucket_bytes": size})[0] for size in (4, 1000))
    assert torch.equal(fine["theta"], coarse["theta"])


# ---- rounds


@pytest.mark.parametrize("every", [1, 3, 4, 11, 100])
def test_every_round_has_exactly_every_steps(ranks: Ranks, every: int) -> None:
    result = ranks.run(2, run_diloco, "one", {"every": every})[0]
    merged_at = [index + 1 for index, report in enumerate(result["reports"][:-1]) if report]
    assert merged_at == list(range(every, STEPS + 1, every))
    assert all(report.steps == every for report in result["reports"][:-1] if report)
    tail = result["reports"][-1]
    assert (tail.steps if tail else 0) == STEPS % every
    assert [report.round for report in result["reports"] if report] == list(range(1, math.ceil(STEPS / every) + 1))


def test_workers_are_apart_until_finish_merges_the_tail(ranks: Ranks) -> None:
    first, second = ranks.run(2, run_diloco, "deep", {"every": 4})
    assert not torch.equal(first["before_finish"], second["before_finish"])
    assert torch.equal(first["theta"], second["theta"])


def finish_again() -> tuple[bool, bool]:
    model = build("deep")
    merger = dm.DiLoCo(model, every=2)
    optimizer = inner("sgd", model)
    train(model, optimizer, dist.get_rank(), 0)
    merger.step()
    merger.finish()
    theta = vector_of(model)
    return merger.finish() is None, torch.equal(theta, vector_of(model))


def test_finish_twice_is_finish_once(ranks: Ranks) -> None:
    assert ranks.run(2, finish_again) == [(True, True)] * 2


# ---- identities


@pytest.mark.parametrize("world", [2, 3])
def test_rate_one_without_momentum_is_averaging(ranks: Ranks, world: int) -> None:
    options = {"every": 3, "outer_lr": 1.0, "outer_momentum": 0.0}
    result = ranks.run(world, run_diloco, "deep", options)[0]
    torch.manual_seed(0)
    models = [build("deep")]
    models += [copy.deepcopy(models[0]) for _ in range(world - 1)]
    optimizers = [inner("adamw", model) for model in models]
    for step in range(STEPS):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            train(model, optimizer, rank, step)
        if (step + 1) % 3 == 0 or step + 1 == STEPS:
            mean = torch.stack([vector_of(model) for model in models]).double().mean(0).float()
            for model in models:
                nn.utils.vector_to_parameters(mean.clone(), model.parameters())
    torch.testing.assert_close(result["theta"], mean, rtol=0, atol=1e-6)
    assert result["anchor"] is None, "averaging needs no memory for an anchor"


@pytest.mark.parametrize("world", [2, 4])
def test_merging_every_sgd_step_is_data_parallelism(ranks: Ranks, world: int) -> None:
    options = {"every": 1, "outer_lr": 1.0, "outer_momentum": 0.0}
    result = ranks.run(world, run_diloco, "deep", options, "sgd")[0]
    torch.manual_seed(0)
    model = build("deep")
    optimizer = inner("sgd", model)
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.stack([loss_of(model, rank, step) for rank in range(world)]).mean().backward()
        optimizer.step()
    torch.testing.assert_close(result["theta"], vector_of(model), rtol=0, atol=1e-6)


# ---- what is reported


@pytest.mark.parametrize("options", [{}, {"outer_lr": 1.0, "outer_momentum": 0.0}], ids=["diloco", "average"])
@pytest.mark.parametrize("kind", ["one", "deep", "norm"])
@pytest.mark.parametrize("world", [2, 3])
def test_the_ledger_is_what_was_sent(ranks: Ranks, world: int, kind: str, options: dict[str, Any]) -> None:
    for result in ranks.run(world, run_diloco, kind, options | {"every": 4, "bucket_bytes": 100}):
        assert result["ledger"] == pytest.approx(result["traffic"], rel=1e-12)
        reports = [report for report in result["reports"] if report]
        assert sum(report.bytes_sent for report in reports) == pytest.approx(result["ledger"][1])
        assert sum(report.collectives for report in reports) == result["ledger"][0]


@pytest.mark.parametrize("options", [{}, {"outer_lr": 1.0, "outer_momentum": 0.0}], ids=["diloco", "average"])
@pytest.mark.parametrize("world", [2, 3])
def test_divergence_and_correlation(ranks: Ranks, world: int, options: dict[str, Any]) -> None:
    options = options | {"every": STEPS + 1}
    results = ranks.run(world, run_diloco, "deep", options)
    torch.manual_seed(0)
    start = vector_of(build("deep")).double()
    deltas = torch.stack([result["before_finish"].double() - start for result in results])
    spread = deltas.square().sum(1).mean()
    merged = deltas.mean(0).square().sum()
    for result in results:
        report = result["reports"][-1]
        assert report.divergence == pytest.approx((spread - merged).item(), rel=1e-4)
        if options.get("outer_lr") != 1.0:
            inner_products = deltas @ deltas.T
            off = (inner_products.sum() - inner_products.trace()) / (world * (world - 1))
            assert report.correlation == pytest.approx((off / spread).item(), rel=1e-4)


# ---- resuming


def interrupted(options: dict[str, Any], stop: int) -> dict[str, Any]:
    """Trained to ``stop``, saved through bytes, and taken up by parts that were made anew."""
    rank = dist.get_rank()

    def parts(seed: int) -> tuple[nn.Module, dm.DiLoCo, torch.optim.Optimizer]:
        torch.manual_seed(seed)
        model = build("norm")
        return model, dm.DiLoCo(model, **options), inner("adamw", model)

    model, merger, optimizer = parts(0)
    saved = b""
    for step in range(STEPS):
        if step == stop:
            file = io.BytesIO()
            torch.save([part.state_dict() for part in (model, merger, optimizer)], file)
            saved = file.getvalue()
        train(model, optimizer, rank, step)
        merger.step()
    merger.finish()
    uninterrupted = whole_state(model, merger, optimizer)

    model, merger, optimizer = parts(77)
    states = torch.load(io.BytesIO(saved), weights_only=True)
    for part, state in zip((model, merger, optimizer), states, strict=True):
        part.load_state_dict(state)
    for step in range(stop, STEPS):
        train(model, optimizer, rank, step)
        merger.step()
    merger.finish()
    resumed = whole_state(model, merger, optimizer)
    return {key: torch.equal(uninterrupted[key], resumed[key]) for key in uninterrupted}


def whole_state(model: nn.Module, merger: dm.DiLoCo, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = dict(model.state_dict())
    tensors["counters"] = torch.tensor([merger.round, merger.steps, merger.workers.ledger.collectives, merger.bytes_sent])
    for name, value in ({} if merger.outer is None else merger.outer.state_dict()).items():
        tensors[name] = torch.zeros(0) if value is None else value
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{name}": torch.as_tensor(value) for name, value in moments.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("stop", [3, 4, 6, 10])
@pytest.mark.parametrize("options", [{}, {"outer_lr": 1.0, "outer_momentum": 0.0}, {"outer_momentum": 0.0}], ids=str)
def test_a_resume_in_mid_round_moves_no_bit(ranks: Ranks, options: dict[str, Any], stop: int) -> None:
    for result in ranks.run(2, interrupted, options | {"every": 4}, stop):
        assert all(result.values()), [key for key, same in result.items() if not same]
