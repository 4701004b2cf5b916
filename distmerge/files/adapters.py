"""LoRA adapters in PEFT's format, as files: ``dW = scale B A`` for each module. Imports no torch.

Format: adapter_config.json and adapter_model.safetensors, https://huggingface.co/docs/peft; LoRA: https://arxiv.org/abs/2106.09685
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from distmerge.errors import UserError
from distmerge.files.header import Stored, read_header
from distmerge.files.models import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
REFUSED = ("use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")


class Factors(NamedTuple):
    """``dW = scale * B [rows, r] @ A [r, columns]`` of one weight."""

    a: Stored
    b: Stored
    scale: float


class Adapter(NamedTuple):
    """Attributes: its directory, its configuration, and the factors by the name of the weight that they change."""

    path: Path
    config: dict[str, Any]
    factors: dict[str, Factors]


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_adapter(path: Path) -> Adapter:
    """The adapter in a directory.

    Raises:
        UserError: when it is none, or does more than add ``B A``.
    """
    config = read_json(path / CONFIG)
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path / CONFIG}: peft_type must be LORA, got {config.get('peft_type')!r}")
    for key in REFUSED:
        if config.get(key):
            raise UserError(f"{path / CONFIG}: {key} is not supported, got {config[key]!r}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float):
        raise UserError(f"{path / CONFIG} must have r >= 1 and a lora_alpha, got {rank!r} and {alpha!r}")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter(path, config, paired(path, read_header(path / WEIGHTS).tensors, scale))


def paired(path: Path, tensors: dict[str, Stored], scale: float) -> dict[str, Factors]:
    """A and B of each weight, their shapes checked."""
    found: dict[str, Factors] = {}
    for name, a in tensors.items():
        if name.endswith(".lora_B.weight") and name.replace(".lora_B.", ".lora_A.") in tensors:
            continue
        b = tensors.get(name.replace(".lora_A.", ".lora_B."))
        if not name.endswith(".lora_A.weight") or b is None:
            raise UserError(f"{path / WEIGHTS}: {name} is no pair of lora_A and lora_B")
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise UserError(f"{path / WEIGHTS}: {name} and its lora_B do not fit: {list(a.shape)}, {list(b.shape)}")
        found[name.removeprefix(PREFIX).removesuffix(".lora_A.weight") + ".weight"] = Factors(a, b, scale)
    return found
