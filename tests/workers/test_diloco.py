"""DiLoCo on real ranks, against K stacked workers in one process and against its own identities."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import distmerge as dm
from distmerge import config
from distmerge.flat import fingerprint
from tests.ranks import Ranks
from tests.spy import counted

STEPS = 11
"""Not a multiple of any ``every`` used here, so that finish() has a tail to merge."""


class Deep(nn.Module):
    """143 parameters, in tensors of odd sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(7, 13), nn.Linear(13, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


def build(kind: str) -> nn.Module:
    match kind:
        case "deep":
            return Deep()
        case "one":
            return nn.Linear(1, 1, bias=False)
        case "wide":  # 90,601 parameters: more than one cache-sized piece
            return nn.Linear(300, 301)
        case "norm":
            return nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5))
    raise AssertionError(kind)


def inner(name: str, model: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.05)
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    """Each worker at each step has data of its own."""
    first = next(model.parameters())
    x = torch.randn(4, first.shape[1], generator=torch.Generator().manual_seed(1000 * rank + step)).to(first.dtype)
    return (model(x) - x.sum(1, keepdim=True)).float().square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, rank: int, step: int) -> None:
    optimizer.zero_grad()
    loss_of(model, rank, step).backward()
    optimizer.step()


def vector_of(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().view(-1) for p in model.parameters()])


# ---- what runs in the ranks


def run_diloco(kind: str, options: dict[str, Any], optimizer_name: str = "adamw", steps: int = STEPS) -> dict[str, Any]:
    """A user's own loop, from weights that differ between the ranks until the merger is made."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = build(kind)
    merger = dm.DiLoCo(model, **options)
    optimizer = inner(optimizer_name, model)
    reports = []
    with counted() as traffic:
        for step in range(steps):
            train(model, optimizer, rank, step)
            reports.append(merger.step())
        before_finish = vector_of(model)
        reports.append(merger.finish())
    return {
        "theta": vector_of(model),
        "before_finish": before_finish,
        "anchor": merger.anchor,
        "reports": reports,
        "traffic": (traffic.collectives, traffic.bytes_sent),
        "ledger": (merger.peers.ledger.collectives, merger.bytes_sent),
    }


def reference(world: int, kind: str, options: dict[str, Any], optimizer_name: str = "adamw", steps: int = STEPS) -> Tensor:
    """K stacked workers in one process; the outer step is torch.optim.SGD's, in float64, on minus the mean delta."""
    torch.manual_seed(0)
    models = [build(kind)]
    models += [copy.deepcopy(models[0]) for _ in range(world - 1)]
    optimizers = [inner(optimizer_name, model) for model in models]
    anchor = nn.Parameter(vector_of(models[0]).double())
    lr, momentum = options.get("outer_lr", 0.7), options.get("outer_momentum", 0.9)
    nesterov = bool(options.get("nesterov", True) and momentum)
    outer = torch.optim.SGD([anchor], lr=lr, momentum=momentum, nesterov=nesterov)
    for step in range(steps):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            train(model, optimizer, rank, step)
        if (step + 1) % options["every"] == 0 or step + 1 == steps:
            stacked = torch.stack([vector_of(model).double() for model in models])
            anchor.grad = -(stacked - anchor.detach()).sum(0) / world
            outer.step()
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
    tensors["counters"] = torch.tensor([merger.round, merger.steps, merger.peers.ledger.collectives, merger.bytes_sent])
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


# ---- buffers


class WithBuffer(nn.Module):
    def __init__(self, name: str, value: Tensor) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer(name, value)


def merged_norm() -> dict[str, Tensor]:
    model = build("norm")
    merger = dm.DiLoCo(model, every=1)
    rank = float(dist.get_rank())
    state = model.state_dict()
    state["1.running_mean"].fill_(rank)
    state["1.running_var"].fill_(2 * rank)
    state["1.num_batches_tracked"].fill_(int(rank) + 5)
    merger.step()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_batch_norm_is_averaged_and_its_counter_is_the_first_workers(ranks: Ranks) -> None:
    for state in ranks.run(3, merged_norm):
        assert torch.equal(state["1.running_mean"], torch.full((5,), 1.0))
        assert torch.equal(state["1.running_var"], torch.full((5,), 2.0))
        assert state["1.num_batches_tracked"].item() == 5


def with_buffer(name: str, policies: dict[str, Any] | None, dtype: str, differ: bool) -> tuple[str, list[float]]:
    """What the merger said, and what the buffer holds after a round and its end."""
    model = WithBuffer(name, torch.zeros(3, dtype=getattr(torch, dtype)))
    try:
        merger = dm.DiLoCo(model, every=5, buffers=policies)
        if differ:
            getattr(model, name).fill_(dist.get_rank() + 1)
        merger.step()
        merger.finish()
    except dm.UserError as error:
        return str(error), getattr(model, name).float().tolist()
    return "", getattr(model, name).float().tolist()


@pytest.mark.parametrize(
    ("policy", "dtype", "outcome"),
    [
        ("mean", "float32", [1.5] * 3),
        ("mean", "bfloat16", [1.5] * 3),
        ("last", "int64", [1.0] * 3),
        ("last", "bool", [1.0] * 3),
        ("last", "float64", [1.0] * 3),
    ],
)
def test_given_policies(ranks: Ranks, policy: str, dtype: str, outcome: list[float]) -> None:
    assert ranks.run(2, with_buffer, "statistic", {"statistic": policy}, dtype, True) == [("", outcome)] * 2


def test_an_unknown_buffer_is_refused_by_name(ranks: Ranks) -> None:
    expected = "buffer statistic has no merge policy; pass buffers={'statistic': 'mean' | 'last' | 'equal'}"
    assert ranks.run(2, with_buffer, "statistic", None, "float32", False) == [(expected, [0.0] * 3)] * 2


def test_buffers_that_must_be_equal_and_are_not(ranks: Ranks) -> None:
    for message, _ in ranks.run(3, with_buffer, "inv_freq", None, "float32", True):
        assert message == (
            "all workers must agree on the buffers ['inv_freq'], which must be equal: worker 1 differs from worker 0"
        )
    assert ranks.run(2, with_buffer, "inv_freq", None, "float32", False) == [("", [0.0] * 3)] * 2


def equal_buffers_are_counted() -> tuple[tuple[int, float], tuple[int, float]]:
    model = WithBuffer("inv_freq", torch.ones(3))
    merger = dm.DiLoCo(model, every=5)
    with counted() as traffic:
        merger.step()
        merger.finish()
    return (merger.peers.ledger.collectives, merger.bytes_sent), (traffic.collectives, traffic.bytes_sent)


def test_comparing_buffers_is_in_the_ledger(ranks: Ranks) -> None:
    for ledger, traffic in ranks.run(3, equal_buffers_are_counted):
        assert ledger == pytest.approx(traffic)


# ---- models that cannot be merged


def differing(what: str) -> str:
    odd = dist.get_rank() == dist.get_world_size() - 1
    model: nn.Module
    match what:
        case "shape":
            model = nn.Linear(3, 5 if odd else 4)
        case "order":
            model = nn.Linear(6, 1, bias=False) if odd else nn.Linear(3, 2, bias=False)
        case "name":
            model = nn.ModuleDict({"b" if odd else "a": nn.Linear(2, 2)})
        case "frozen":
            model = nn.Linear(3, 3)
            model.bias.requires_grad_(not odd)
        case "buffer":
            model = WithBuffer("position_ids", torch.zeros(4 if odd else 3))
        case "buffer missing":
            model = WithBuffer("position_ids", torch.zeros(3)) if odd else nn.ModuleDict({"layer": nn.Linear(2, 2)})
        case _:
            raise AssertionError(what)
    with pytest.raises(dm.UserError) as caught:
        dm.DiLoCo(model, every=2)
    return str(caught.value)


@pytest.mark.parametrize("what", ["shape", "order", "name", "frozen", "buffer", "buffer missing"])
def test_models_that_differ_are_refused_on_all_ranks(ranks: Ranks, what: str) -> None:
    for message in ranks.run(3, differing, what):
        assert message.startswith("all workers must agree on the names and shapes of the parameters and buffers: ")
        assert message.endswith("worker 2 differs from worker 0")


def test_before_the_process_group() -> None:
    with pytest.raises(dm.UserError, match="init_process_group"):
        dm.DiLoCo(nn.Linear(2, 2), every=5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": 0}, "every must be >= 1, got 0"),
        ({"every": 2.5}, "every must be an integer, got 2.5"),
        ({"every": 5, "outer_lr": 0}, "outer_lr must be > 0, got 0"),
        ({"every": 5, "outer_lr": math.nan}, "outer_lr must be > 0, got nan"),
        ({"every": 5, "outer_momentum": 1.0}, "outer_momentum must be < 1, got 1.0"),
        ({"every": 5, "bucket_bytes": 3}, "bucket_bytes must be >= 4, got 3"),
    ],
    ids=str,
)
def test_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(dm.UserError) as caught:
        dm.DiLoCo(nn.Linear(2, 2), **options)
    assert str(caught.value) == message


def moved() -> str:
    model = build("deep")
    merger = dm.DiLoCo(model, every=1)
    model.inner.weight.data = model.inner.weight.data.clone()  # pyright: ignore
    with pytest.raises(dm.UserError) as caught:
        merger.step()
    return str(caught.value)


def test_a_model_moved_after_the_merger_was_made(ranks: Ranks) -> None:
    expected = "parameter inner.weight was moved after the merger was made; make the merger after model.to()"
    assert ranks.run(2, moved) == [expected] * 2


# ---- models of other kinds


def half_precision() -> tuple[str, Tensor, Tensor]:
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = build("deep").bfloat16()
    merger = dm.DiLoCo(model, every=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25 * (rank + 1))
    merger.step()
    assert merger.anchor is not None
    return str(merger.anchor.dtype), merger.anchor.clone(), vector_of(model)


def test_a_bfloat16_model_has_a_float32_anchor(ranks: Ranks) -> None:
    results = ranks.run(2, half_precision)
    for dtype, anchor, theta in results:
        assert dtype == "torch.float32"
        assert theta.dtype == torch.bfloat16
        assert torch.equal(theta, anchor.bfloat16())
        assert torch.equal(theta, results[0][2])


def tied_and_frozen() -> tuple[int, list[bool]]:
    model: Any = nn.ModuleDict({"table": nn.Embedding(5, 3), "frozen": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["table"].weight
    model["frozen"].requires_grad_(False)
    merger = dm.DiLoCo(model, every=1, outer_lr=1.0, outer_momentum=0.0)
    rank = dist.get_rank()
    with torch.no_grad():
        model["table"].weight.fill_(rank)
        model["frozen"].weight.fill_(rank)
    merger.step()
    merged = bool((model["head"].weight == 0.5).all())
    return merger.flat.vector.numel(), [
        merged,
        model["head"].weight is model["table"].weight,
        bool((model["frozen"].weight == rank).all()),
    ]


def test_tied_weights_are_merged_once_and_frozen_ones_never(ranks: Ranks) -> None:
    assert ranks.run(2, tied_and_frozen) == [(15, [True] * 3)] * 2


def several_mergers() -> tuple[bool, bool, Tensor]:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = build("deep")
    first, second = dm.DiLoCo(model, every=2, outer_lr=1.0, outer_momentum=0.0), dm.DiLoCo(model, every=4)
    optimizer = inner("sgd", model)
    merged = True
    for step in range(STEPS):
        train(model, optimizer, rank, step)
        reports = [merger.step() for merger in (first, second)]
        merged &= [report is not None for report in reports] == [(step + 1) % 2 == 0, (step + 1) % 4 == 0]
    first.finish()
    second.finish()
    return merged, first.flat.vector.data_ptr() == second.flat.vector.data_ptr(), vector_of(model)


def test_several_mergers_on_one_model(ranks: Ranks) -> None:
    results = ranks.run(2, several_mergers)
    assert all(merged and shared for merged, shared, _ in results)
    assert torch.equal(results[0][2], results[1][2])


# ---- workers of several ranks


def two_by_two(kind: str, options: dict[str, Any]) -> dict[str, Any]:
    """Two workers of two ranks: a worker's ranks train on the same data, as if their gradients had been reduced."""
    from distmerge.engine.torch import ReplicatedParameters
    from distmerge.launch import Place
    from distmerge.mesh import Mesh

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = Mesh(config.Mesh(workers=2, timeout_seconds=30), Place(rank, world, rank, world), threads=1)
    torch.manual_seed(mesh.worker)
    model = build(kind)
    merger = dm.DiLoCo(ReplicatedParameters(model, mesh), **options, group=mesh.peers)
    optimizer = inner("adamw", model)
    with counted(mesh.peers) as traffic:
        for step in range(STEPS):
            train(model, optimizer, mesh.worker, step)
            merger.step()
        tail = merger.finish()
    with contextlib.closing(mesh):
        return {
            "theta": vector_of(model),
            "digest": fingerprint(vector_of(model)).item(),
            "tail": tail,
            "share": merger.flat.vector.numel(),
            "traffic": (traffic.collectives, traffic.bytes_sent),
            "ledger": (merger.peers.ledger.collectives, merger.bytes_sent),
        }


@pytest.mark.parametrize("kind", ["one", "deep"])
def test_a_workers_ranks_share_the_traffic(ranks: Ranks, kind: str) -> None:
    options = {"every": 4, "bucket_bytes": 100}
    alone = ranks.run(2, run_diloco, kind, options)
    results = ranks.run(4, two_by_two, kind, options, group=False)
    assert len({result["digest"] for result in results}) == 1
    torch.testing.assert_close(results[0]["theta"], alone[0]["theta"], rtol=0, atol=1e-6)
    numel = results[0]["theta"].numel()
    assert sorted(result["share"] for result in results[:2]) == [numel // 2, numel - numel // 2]
    for result in results:
        assert result["ledger"] == pytest.approx(result["traffic"])
        buckets = math.ceil(4 * result["share"] / 100)
        beside = 3 * (24 + 4 * buckets)  # each merge's three scalars, and each bucket's weight
        assert result["ledger"][1] - beside == pytest.approx(4 * result["share"] * 3)
        assert result["tail"].divergence == pytest.approx(alone[0]["reports"][-1].divergence, rel=1e-4)
    beside = 3 * (24 + 4 * math.ceil(4 * numel / 100))
    assert alone[0]["ledger"][1] - beside == pytest.approx(4 * numel * 3)
