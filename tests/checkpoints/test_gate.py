"""The gate on windows whose drift and noise are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distmerge.windows.advice import advise, explain, gram_of, gram_of_chunk


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
