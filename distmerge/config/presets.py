"""Settings that go together, under the field's names. Imports no torch."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # https://arxiv.org/abs/2501.18512: fragments in turn, one step of overlap, 4-bit values. The outer optimizer is left open,
    # as DiLoCo's is, and workers take the anchor whole: with the paper's 0.4 and 0.9 and mix of 0.5 the loss was 0.7% higher
    # (benchmarks/records/streaming.json).
    "streaming-diloco": {
        "fragments": 4,
        "overlap": 1,
        "mix": 0.0,
        "wire": "int4",
        "error_feedback": True,
    },
    # https://arxiv.org/abs/2311.08105: the outer optimizer of DiLoCo's paper, made for many merges of 500 steps each.
    "paper-diloco": {"outer_lr": 0.7, "outer_momentum": 0.9},
    # https://arxiv.org/abs/1805.09767: plain averaging of the parameters.
    "local-sgd": {"outer_lr": 1.0, "outer_momentum": 0.0},
}
"""For the library: ``dm.DiLoCo(model, every=100, **dm.PRESETS["streaming-diloco"])``."""


def outer_of(workers: int) -> dict[str, float]:
    """The outer optimizer that serves a run of so many workers, unless its user knows better.

    Measured in runs of 10 to 100 merges with 2 workers and of 100 with 4: the best of all settings that were tried
    (benchmarks/records/quality.json, studies.json). With 2 workers the first merge moves by 1.05 of the mean delta, hardly more
    than an average, so that few merges do no harm.
    """
    return {"outer_lr": 0.7 if workers < 4 else 1.0, "outer_momentum": 0.5}


def every_of(steps: int, least: int = 1) -> int:
    """Inner steps between merges that give a run 100 merges, but from 10 to 100, and not below ``least``.

    The gap to data parallelism after 2,000 steps was 1.8% with 100 merges, 4.0% with 40 and 6.0% with 10
    (benchmarks/records/studies.json).
    """
    return max(least, min(100, max(10, steps // 100)))
