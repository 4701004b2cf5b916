"""The gate on windows whose drift and noise are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distmerge.windows.advice import advise, explain, gram_of, gram_of_chunk, noise_of
from distmerge.windows.curves import weights


def window(n: int, drift: float, noise: float, size: int = 20000) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(size, generator=generator)
    return [1 + drift * i / n * direction + noise * torch.randn(size, generator=generator) for i in range(n)]


def test_noise_alone_merges_everything() -> None:
    found = advise(gram_of(window(10, 0.0, 0.1)), list(range(10)))
    assert found.merge and found.count == 10 and found.effective > 8
    assert found.ratio == pytest.approx(1 / 9, rel=0.05)
    assert np.mean(found.cosines) == pytest.approx(-0.5, abs=0.02)
    assert found.noise == pytest.approx(0.01 * 20000, rel=0.05)


def test_a_straight_line_is_not_merged() -> None:
    found = advise(gram_of(window(10, 1.0, 0.0)), list(range(10)))
    assert not found.merge and found.count == 1
    assert found.ratio == pytest.approx(9, rel=0.01)
    assert np.mean(found.cosines) == pytest.approx(1, abs=0.01)
    assert "should not help" in explain(found, [str(i) for i in range(10)])


def test_drift_along_flat_directions_is_merged_once_the_curvature_tells() -> None:
    """Noise in the steep half, drift in the flat one: plain distances see drift that costs no loss."""
    steep = torch.cat([torch.ones(10000), torch.zeros(10000)])
    noise, drift = window(10, 0.0, 0.1), window(10, 2.0, 0.0)
    members = [steep * n + (1 - steep) * d for n, d in zip(noise, drift, strict=True)]
    plain = advise(gram_of(members), list(range(10)))
    weighed = advise(gram_of_chunk(members, steep + 1e-6), list(range(10)))
    assert plain.count <= 2 and weighed.merge and weighed.count == 10


def test_in_between_takes_a_shorter_window() -> None:
    found = advise(gram_of(window(20, 0.4, 0.1)), list(range(20)))
    assert found.merge and 1 < found.count < 20
    assert "should help" in explain(found, [str(i) for i in range(20)])


SIZE = 20000


def path(kind: str, n: int, length: float) -> torch.Tensor:
    """``[n, SIZE]``: where members would be without noise; the whole way is about ``length`` for each element."""
    generator = torch.Generator().manual_seed(1)
    one, two = torch.randn(2, SIZE, generator=generator)
    x = torch.arange(n)[:, None] / n
    match kind:
        case "none":
            return torch.zeros(n, SIZE)
        case "straight":
            return length * x * one
        case "slowing":
            return length * (1 - torch.exp(-3 * x)) * one
        case "turning":
            return length * (torch.sin(3 * x) * one + torch.cos(3 * x) * two) / 3
        case "speeding":
            return length * x.square() * one
    return length * torch.randn(n, SIZE, generator=generator).cumsum(0) / n**0.5  # a random walk


def gains(kind: str, length: float, noise: float, n: int = 12) -> tuple[float, float, int]:
    """The gain that is promised, the true one of the merge that is advised, and how many members it takes."""
    clean = path(kind, n, length)
    members = clean + noise * torch.randn(n, SIZE, generator=torch.Generator().manual_seed(2))
    found = advise(gram_of(list(members)), list(range(n)))
    c = torch.tensor(weights(found.curve, [i / found.count for i in range(found.count)])) if found.count > 1 else torch.ones(1)
    merged = (c.float()[:, None] * members[-found.count :]).sum(0)
    alone = (members[-1] - clean[-1]).square().sum()
    true = 1 - float((merged - clean[-1]).square().sum() / alone) if noise else 0.0
    return found.gain, true, found.count


@pytest.mark.parametrize("kind", ["straight", "slowing", "turning", "speeding", "walk"])
def test_pure_drift_of_any_form_promises_nothing(kind: str) -> None:
    promised, _, count = gains(kind, 1.0, 0.0)
    assert (promised, count) == (0.0, 1)


@pytest.mark.parametrize("length", [0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["none", "straight", "slowing", "turning", "speeding", "walk"])
def test_the_gain_that_is_promised_is_the_true_one(kind: str, length: float) -> None:
    """From noise alone to a drift thirty times as far as the noise reaches; it may say too little, but not too much."""
    promised, true, _ = gains(kind, length, 0.1)
    assert true - 0.1 < promised < true + 0.03


def test_the_noise_is_found_beside_any_drift_and_at_uneven_steps() -> None:
    x = np.array([0.0, 1, 3, 4, 7, 8, 9, 12]) / 13
    one = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    noise = 0.1 * torch.randn(len(x), SIZE, generator=torch.Generator().manual_seed(2))
    members = list(torch.tensor(x, dtype=torch.float32)[:, None] * one + noise)
    assert noise_of(gram_of(members), x).square == pytest.approx(0.01 * SIZE, rel=0.1)
    assert noise_of(gram_of(members[:2]), x[:2]).square == 0
    assert 0 < noise_of(gram_of(list(noise[:3])), x[:3]).square < 0.012 * SIZE


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_noise_that_is_correlated_promises_less(drift: float) -> None:
    """Twelve members of noise that is correlated by a half are not twelve independent ones."""
    n, generator = 12, torch.Generator().manual_seed(2)
    noise = [torch.randn(SIZE, generator=generator)]
    for _ in range(n - 1):
        noise.append(0.5 * noise[-1] + 0.75**0.5 * torch.randn(SIZE, generator=generator))
    members = list(path("straight", n, drift) + 0.1 * torch.stack(noise))
    found = advise(gram_of(members), list(range(n)))
    c = torch.tensor(weights(found.curve, [i / found.count for i in range(found.count)])).float()
    merged = (c[:, None] * torch.stack(members[-found.count :])).sum(0) - path("straight", n, drift)[-1]
    true = 1 - float(merged.square().sum() / (0.1 * noise[-1]).square().sum())
    assert found.merge and true - 0.15 < found.gain < true + 0.05
