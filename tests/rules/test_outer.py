"""The outer step against torch.optim.SGD and against its plain form."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distmerge.rules.outer import outer_step

GENERATOR = torch.Generator().manual_seed(0)
DELTAS = torch.randn(6, 17, generator=GENERATOR)
START = torch.randn(17, generator=GENERATOR)


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.4, 0.0), (1.0, 0.0)])
def test_is_sgd_on_minus_the_delta(lr: float, momentum: float, nesterov: bool) -> None:
    anchor, velocity = START.clone(), torch.zeros(17) if momentum else None
    theirs = nn.Parameter(START.double())
    sgd = torch.optim.SGD([theirs], lr=lr, momentum=momentum, nesterov=nesterov and momentum > 0)
    for delta in DELTAS:
        kept = delta.clone()
        outer_step(anchor, delta, velocity, lr, momentum, nesterov)
        assert torch.equal(delta, kept)
        theirs.grad = -delta.double()
        sgd.step()
        torch.testing.assert_close(anchor.double(), theirs.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_plain_form(nesterov: bool) -> None:
    """buf = mu buf + g; anchor -= lr (g + mu buf), or lr buf; g = -delta. In float64, number by number."""
    lr, momentum = 0.7, 0.9
    anchor, velocity = START[:1].clone(), torch.zeros(1)
    a, buf = float(START[0]), 0.0
    for delta in DELTAS[:, :1]:
        outer_step(anchor, delta, velocity, lr, momentum, nesterov)
        g = -float(delta)
        buf = momentum * buf + g
        a -= lr * (g + momentum * buf) if nesterov else lr * buf
        assert float(anchor) == pytest.approx(a, abs=1e-6)


def test_known_sizes() -> None:
    """With (0.7, 0.9) the first step moves 1.33 times the delta; a constant delta comes to move 7 times it."""
    anchor, velocity, delta = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64), torch.ones(1).double()
    outer_step(anchor, delta, velocity, 0.7, 0.9)
    assert anchor.item() == pytest.approx(0.7 * 1.9)
    for _ in range(400):
        before = anchor.item()
        outer_step(anchor, delta, velocity, 0.7, 0.9)
    assert anchor.item() - before == pytest.approx(7.0, rel=1e-6)


def test_rate_one_without_momentum_adds_the_delta() -> None:
    anchor = START.clone()
    outer_step(anchor, DELTAS[0], None, 1.0)
    assert torch.equal(anchor, START + DELTAS[0])


def test_a_velocity_belongs_to_a_momentum() -> None:
    with pytest.raises(AssertionError):
        outer_step(torch.zeros(1), torch.zeros(1), None, 1.0, 0.9)
    with pytest.raises(AssertionError):
        outer_step(torch.zeros(1), torch.zeros(1), torch.zeros(1), 1.0)
