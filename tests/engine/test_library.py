"""Mergers in a user's own loop, on a vision model, however it is laid out; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distmerge as dm
from tests.ranks import Ranks

pytest.importorskip("deepspeed")


@pytest.fixture(scope="module")
def pool() -> Iterator[Ranks]:
    """Of our own, see test_matrix."""
    ranks = Ranks()
    yield ranks
    ranks.close()


class Vision(nn.Module):
    """A convolutional network with batch normalisation, whose running statistics merge, too."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.ReLU())
        self.head = nn.Linear(5 * 16, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images).flatten(1))


def examples(seed: int) -> tuple[Tensor, Tensor]:
    """16 images of 8 x 8 with a bright band at one of three heights."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (16,), generator=generator)
    images = torch.randn(16, 1, 8, 8, generator=generator) * 0.3
    for image, label in zip(images, labels, strict=True):
        image[0, 2 * int(label) : 2 * int(label) + 2] += 1
    return images, labels


def lay_out(kind: str, mesh: Any) -> tuple[Any, Any, int]:
    """The model, what steps it, and the ranks of a worker."""
    model = Vision()
    inside = mesh.get_group("shard")
    if kind == "zero 2":
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 16,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, mpu=dm.WorkerRanks(inside))
        return engine, engine, 2
    if kind == "fsdp":
        fully_shard(model.features, mesh=mesh["shard"])
        fully_shard(model, mesh=mesh["shard"])
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=inside)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2), 1 if kind == "plain" else 2


def train_vision(kind: str) -> dict[str, Any]:
    """Two workers of two ranks, or four of one where the model is plain."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("worker", "shard"))
    torch.manual_seed(dist.get_rank())
    model, stepper, ranks_per_worker = lay_out(kind, mesh)
    peers = dist.group.WORLD if ranks_per_worker == 1 else mesh.get_group("worker")
    merger = dm.compose(dm.SPARTA(model, fraction=0.1, group=peers), dm.DiLoCo(model, every=6, group=peers))
    losses = []
    for step in range(20):
        images, labels = examples(100 * dist.get_rank() + step)
        loss = nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        if kind == "zero 2":
            stepper.backward(loss)
        else:
            stepper.zero_grad()
            loss.backward()
        stepper.step()
        merger.step()
    merger.finish()
    model.eval()
    with torch.no_grad():
        outputs = model(examples(7)[0])
    return {"losses": losses, "outputs": outputs, "bytes": merger.bytes_sent, "rounds": [m.round for m in merger.mergers]}


@pytest.mark.parametrize("kind", ["plain", "ddp", "fsdp", "zero 2"])
def test_a_vision_model_however_it_is_laid_out(pool: Ranks, kind: str) -> None:
    results = pool.run(4, train_vision, kind)
    assert all(torch.equal(result["outputs"], results[0]["outputs"]) for result in results)
    assert sum(results[0]["losses"][-4:]) < sum(results[0]["losses"][:4]) - 0.4
    assert results[0]["rounds"] == [20, 4]


def refused(kind: str) -> str:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("worker", "shard"))
    model = Vision()
    if kind == "fsdp":
        fully_shard(model, mesh=mesh["shard"])
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("shard"))
    elif kind == "in part":
        fully_shard(model.features, mesh=mesh["shard"])
    try:
        dm.DiLoCo(model, every=2)
    except ValueError as error:
        return str(error)
    return "taken"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("fsdp", "group must have one rank of each worker, those that hold the same part of the model, got ranks [0, 1] of"),
        ("ddp", "group must have one rank of each worker"),
        ("in part", "parameter head.weight must be sharded like the others: call fully_shard on the whole model as well"),
    ],
)
def test_ranks_of_one_worker_are_not_merged(pool: Ranks, kind: str, reason: str) -> None:
    assert all(reason in said for said in pool.run(2, refused, kind))


def composed() -> list[str]:
    said = []
    for mergers in ((), (dm.DiLoCo(nn.Linear(1, 1), every=2), dm.DiLoCo(nn.Linear(1, 1), every=2))):
        with pytest.raises(ValueError) as caught:
            dm.compose(*mergers)
        said.append(str(caught.value))
    return said


def test_compose_wants_mergers_of_one_model(pool: Ranks) -> None:
    assert pool.run(2, composed)[0] == [
        "compose must be given at least one merger, got none",
        "compose must be given mergers of one model, got mergers of several",
    ]


def test_before_init_process_group_it_says_what_to_call() -> None:
    with pytest.raises(ValueError, match=r"call torch.distributed.init_process_group\(\) first"):
        dm.DiLoCo(nn.Linear(1, 1), every=2)


# ---- the per-parameter path, for versions of DeepSpeed whose partitions are not known


def by_parameter(stage: int) -> tuple[bool, bool]:
    """Whether both paths read the same masters, and whether what the slow one writes is what the fast one then reads."""
    import deepspeed

    from distmerge.engine.master_weights import PublicMasterWeights, master_parameters

    both = init_device_mesh("cpu", (2,)).get_group()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        config=config | {"zero_allow_untested_optimizer": True},
        mpu=dm.WorkerRanks(both),
    )
    engine.backward(engine(torch.randn(4, 7).bfloat16()).float().square().mean())
    engine.step()
    fast, slow = master_parameters(engine), master_parameters(engine, by_parameter=True)
    assert isinstance(slow, PublicMasterWeights)
    slow.pull()
    names = {slot.name: slot.offset for slot in slow.layout}

    def agree() -> bool:
        fast.pull()
        return all(
            torch.equal(
                fast.vector[part.offset : part.offset + part.numel],
                slow.whole[names[part.name] + part.first : names[part.name] + part.first + part.numel],
            )
            for part in fast.parts()
        )

    read = agree()
    slow.vector.add_(0.25)
    slow.push()
    written = agree()
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(3)).bfloat16()
    with torch.no_grad():
        engine.eval()
        whole = {name: view.bfloat16() for name, view in slow.named_views()}
        expected = nn.functional.linear(
            nn.functional.linear(x, whole["0.weight"], whole["0.bias"]), whole["1.weight"], whole["1.bias"]
        )
        refreshed = torch.equal(engine(x), expected)
    engine.destroy()
    return read and written, refreshed


@pytest.mark.parametrize("stage", [2, 3])
def test_parameter_by_parameter_is_the_same(pool: Ranks, stage: int) -> None:
    assert pool.run(2, by_parameter, stage) == [(True, True)] * 2
