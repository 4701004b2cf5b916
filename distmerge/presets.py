"""Settings that go together, under the field's names. Imports no torch."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    # https://arxiv.org/abs/2501.18512: fragments in turn, one step of overlap, half of the local steps kept, 4-bit values.
    "streaming-diloco": {
        "fragments": 4,
        "overlap": 1,
        "mix": 0.5,
        "outer_lr": 0.4,
        "outer_momentum": 0.9,
        "wire": "int4",
        "error_feedback": True,
    },
    # https://arxiv.org/abs/1805.09767: plain averaging of the parameters.
    "local-sgd": {"outer_lr": 1.0, "outer_momentum": 0.0},
}
"""For the library: ``dm.DiLoCo(model, every=100, **dm.PRESETS["streaming-diloco"])``."""
