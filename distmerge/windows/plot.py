"""Plots a merge: its weights, the learning-rate curve that they imply, and its frequency response as a low-pass filter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distmerge.windows.curves import effective_count, frequency_response, implied_curve


def plot(members: Sequence[float] | np.ndarray, shares: Sequence[float], path: Path, title: str = "") -> None:
    """Write the plot; the suffix of ``path`` chooses the format (.svg, .png, .pdf).

    Args:
        members, shares: ``[n]`` the members' weights and positions, as in :func:`distmerge.windows.curves.weights`.
    """
    from matplotlib.figure import Figure

    curve = implied_curve(members, shares)
    cycles = np.linspace(0, len(shares), 400)
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    weight, decay, response = figure.subplots(1, 3)
    weight.bar(range(len(shares)), members)
    weight.set(title=f"{title} weights, N_eff {effective_count(members):.1f}", xlabel="member, oldest first")
    decay.plot(curve.x, curve.d, marker="o")
    decay.set(title="implied learning rate", xlabel="share of the window's tokens", ylim=(0, 1.05))
    response.plot(cycles, frequency_response(members, shares, cycles.tolist()))
    response.set(title="low-pass response", xlabel="cycles per window", ylim=(0, 1.05))
    figure.savefig(path)
