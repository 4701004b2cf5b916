"""Theta as one vector: views, layouts, what is in it and what is not, and its fingerprint."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from distmerge.engine.flatten import flatten
from distmerge.errors import UserError
from distmerge.theta.flat import FlatParameters, fingerprint, pieces


class Mixed(nn.Module):
    """Odd sizes, a scalar, an empty tensor in the middle, a matrix that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(3.0))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.turned = nn.Parameter(torch.arange(6.0).view(2, 3).T)
        self.last = nn.Parameter(torch.arange(5.0))


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_parameters_become_views() -> None:
    model = Mixed()
    before = values(model)
    flat = FlatParameters(model)
    assert flat.vector.shape == (12,)
    assert flat.vector.dtype == torch.float32
    assert flat.vector.is_contiguous()
    assert all(torch.equal(old, new) for old, new in zip(before, values(model), strict=True))
    flat.pull()
    flat.vector.copy_(torch.arange(12.0) * 2)
    flat.push()
    assert model.scalar.item() == 0
    assert model.turned.tolist() == [[2, 4], [6, 8], [10, 12]]
    with torch.no_grad():
        model.last.fill_(7)
    assert flat.vector[-5:].tolist() == [7] * 5


def test_the_layout() -> None:
    flat = FlatParameters(Mixed())
    assert [(slot.name, slot.shape, slot.offset, slot.stop) for slot in flat.layout] == [
        ("scalar", (), 0, 1), ("empty", (0, 4), 1, 1), ("turned", (3, 2), 1, 7), ("last", (5,), 7, 12),
    ]  # fmt: skip
    for name, view in flat.named_views():
        assert torch.equal(view, dict(flat.model.named_parameters())[name])


@pytest.mark.parametrize("model", [Mixed(), nn.Linear(1, 1, bias=False), nn.Linear(3, 2)], ids=["mixed", "one", "linear"])
def test_laying_out_twice_gives_the_same_vector(model: nn.Module) -> None:
    first = FlatParameters(model)
    second = flatten(model)
    assert second.vector.data_ptr() == first.vector.data_ptr()
    assert second.vector.shape == first.vector.shape
    assert flatten(second) is second
    second.vector.add_(1)
    first.check()
    assert torch.equal(first.vector, second.vector)


def test_a_vector_is_not_taken_for_a_part_of_it() -> None:
    """A model whose first layer alone was laid out is laid out anew, and the first layout says that it is no more."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    part = FlatParameters(model[0])
    whole = FlatParameters(model)
    assert whole.vector.numel() == 12
    whole.check()
    with pytest.raises(UserError, match=r"parameter weight was moved after the merger was made"):
        part.pull()


def test_training_works_on_views() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    flattened = copy.deepcopy(plain)
    flat = FlatParameters(flattened)
    for model in (plain, flattened):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.full((2, 3), float(step))).sum().backward()
            optimizer.step()
    assert torch.equal(flat.vector, torch.cat([p.detach().view(-1) for p in plain.parameters()]))
    assert not flat.vector.requires_grad


def test_state_dicts_load_into_views() -> None:
    model = Mixed()
    flat = FlatParameters(model)
    model.load_state_dict({name: torch.ones_like(tensor) for name, tensor in model.state_dict().items()})
    flat.check()
    assert torch.equal(flat.vector, torch.ones(12))


def test_tied_once_and_frozen_not() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 3), "frozen": nn.Linear(3, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["table"].weight
    model["frozen"].requires_grad_(False)
    flat = FlatParameters(model)
    assert [slot.name for slot in flat.layout] == ["table.weight"]
    flat.vector.fill_(2)
    assert bool((model["head"].weight == 2).all())  # pyright: ignore
    assert model["head"].weight is model["table"].weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_types_are_copied_in_and_out(dtype: torch.dtype) -> None:
    model = Mixed().to(dtype)
    flat = FlatParameters(model)
    assert flat.vector.dtype == torch.float32
    with torch.no_grad():
        model.last.fill_(1.5)
    assert flat.vector[-1] != 1.5
    flat.pull()
    assert flat.vector[-1] == 1.5
    flat.vector.fill_(0.1)
    assert model.last[0] == 1.5
    flat.push()
    assert model.last[0] == torch.tensor(0.1).to(dtype)
    assert model.last.dtype == dtype


def test_one_float32_parameter_among_others_is_copied_too() -> None:
    model = nn.Sequential(nn.Linear(2, 2).bfloat16(), nn.Linear(2, 2))
    flat = FlatParameters(model)
    flat.vector.fill_(3)
    flat.push()
    assert all(bool((p == 3).all()) for p in model.parameters())


@pytest.mark.parametrize(
    "move", [lambda m: m.double(), lambda m: m.last.__setattr__("data", torch.zeros(5))], ids=["to", "data"]
)
def test_a_model_that_moved_is_refused(move) -> None:
    model = Mixed()
    flat = FlatParameters(model)
    move(model)
    with pytest.raises(UserError, match=r"was moved after the merger was made; make the merger after model.to\(\)"):
        flat.pull()


def test_only_zero_size_parameters() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(0)), nn.Parameter(torch.zeros(3, 0))])
    flat = FlatParameters(model)
    flat.pull()
    assert flat.vector.numel() == 0
    assert FlatParameters(model).vector.numel() == 0


def test_models_that_cannot_be_flat() -> None:
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(UserError, match="no trainable parameter"):
        FlatParameters(frozen)
    shared = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    shared["b"].weight = nn.Parameter(shared["a"].weight.data)  # pyright: ignore
    with pytest.raises(UserError, match=r"parameters a.weight and b.weight share memory but are two objects"):
        FlatParameters(shared)
    complex_model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    with pytest.raises(UserError, match="must be floating point"):
        FlatParameters(complex_model)


def test_float64_is_refused() -> None:
    """Through float32 it would lose its low bits in silence."""
    with pytest.raises(UserError, match=r"parameter weight must be float32, .* got torch.float64"):
        FlatParameters(nn.Linear(2, 2).double())


def assign(model: nn.Sequential) -> None:
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)


def replace(model: nn.Sequential) -> None:
    model[2] = nn.Linear(3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (assign, r"parameter 0.weight is not the one that the merger was made with: use load_state_dict\(\) without assign"),
        (replace, "parameter 2.weight is not the one that the merger was made with"),
        (lambda model: model[1].requires_grad_(True), "parameter 1.weight trains, but did not when the merger was made"),
        (lambda model: model.append(nn.Linear(3, 3)), "parameter 3.weight trains, but did not when the merger was made"),
        (lambda model: model[0].requires_grad_(False), "parameter 0.weight was frozen after the merger was made"),
        (lambda model: model.pop(2), "parameter 2.weight was removed from the model after the merger was made"),
    ],
    ids=["assign", "replace", "unfreeze", "append", "freeze", "remove"],
)
def test_a_model_that_trains_other_parameters_is_refused(change, message: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).requires_grad_(False), nn.Linear(3, 3)).to(dtype)
    flat = FlatParameters(model)
    flat.pull()
    change(model)
    with pytest.raises(UserError, match=message):
        flat.pull()


def test_manifests() -> None:
    def manifest(*shapes: tuple[int, ...], buffer: Tensor | None = None) -> int:
        model = nn.ParameterList([nn.Parameter(torch.zeros(shape)) for shape in shapes])
        if buffer is not None:
            model.register_buffer("extra", buffer)
        return FlatParameters(model).manifest

    assert manifest((2, 3)) == manifest((2, 3))
    different = [
        manifest((2, 3)), manifest((3, 2)), manifest((6,)), manifest((2, 3), (1,)), manifest((1,), (2, 3)),
        manifest((2, 3), buffer=torch.zeros(2)), manifest((2, 3), buffer=torch.zeros(3)),
        manifest((2, 3), buffer=torch.zeros(2, dtype=torch.int64)),
    ]  # fmt: skip
    assert len(set(different)) == len(different)
    assert all(0 <= one < 2**63 for one in different)


# ---- fingerprints


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_a_fingerprint_sees_any_bit_and_any_position(dtype: torch.dtype) -> None:
    base = (torch.arange(1, 18) % 2).to(dtype) if dtype == torch.bool else torch.arange(1, 18).to(dtype)
    digests = {fingerprint(base).item()}
    for index in range(17):
        changed = base.clone()
        changed.view(torch.uint8)[index * base.element_size()] ^= 1
        digests.add(fingerprint(changed).item())
    assert len(digests) == 18
    assert fingerprint(base.clone()).item() == fingerprint(base).item()
    assert fingerprint(base.view(1, 17).T).item() == fingerprint(base).item(), "of the elements, in their order"


def test_a_fingerprint_sees_swaps_signs_of_zero_and_nans() -> None:
    x = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    swapped = x.clone()
    swapped[[3, 90_000]] = x[[90_000, 3]]
    assert fingerprint(swapped) != fingerprint(x)
    assert fingerprint(torch.tensor([0.0])) != fingerprint(torch.tensor([-0.0]))
    nan = torch.tensor([float("nan")])
    assert fingerprint(nan) == fingerprint(nan.clone())
    assert fingerprint(torch.zeros(0)).shape == ()


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 1), (5, 5 + (1 << 16)), (0, 3 * (1 << 16) + 7)])
def test_pieces_cover_exactly(start: int, stop: int) -> None:
    covered = [index for piece in pieces(torch.zeros(1), start, stop) for index in range(piece.start, piece.stop)]
    assert covered == list(range(start, stop))
