"""Reads LoRA adapters in PEFT's format: what an adapter changes in each weight of its base. Imports no torch.

Format: adapter_config.json and adapter_model.safetensors, https://huggingface.co/docs/peft; LoRA: https://arxiv.org/abs/2106.09685.
Keys of the configuration and tensors are allowed by name, and an adapter with any other is refused: PEFT keeps adding variants
of LoRA, and a list of those to refuse would soon be out of date.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from distmerge.errors import UserError
from distmerge.files.header import Stored, read_header, shown
from distmerge.files.models import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

UNDERSTOOD = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "lora_bias", "fan_in_fan_out",
    "init_lora_weights", "target_parameters", "bias", "modules_to_save",
)  # fmt: skip
WITHOUT_EFFECT = (
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "runtime_config", "megatron_core",
    "qalora_group_size", "eva_config", "loftq_config", "corda_config", "lora_ga_config",
)  # fmt: skip
"""Keys that say how an adapter was made or which modules it is on, which its tensors' names say as well; or that configure a
feature which another, checked key enables. Any other key must be off (null, false, 0 or empty)."""

PLAIN_INITS = (None, True, False, "true", "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that do not change the base model."""

RESIDUAL_INITS = ("pissa", "olora")
"""Initialisations that subtract the adapter's initial ``scale B A`` from the base, and compute it from the base alone. The
others that do so (CorDA, LoftQ, LoRA-GA, PiSSA by a randomised SVD) are refused: theirs depends on data or random numbers that
the adapter does not contain."""

NAMES = re.compile(
    r"(?P<stem>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector(?:\.weight)?)"
)


class Factors(NamedTuple):
    """The change ``dW = scale B A`` of one weight, with B ``[rows, r]`` and A ``[r, columns]``.

    Attributes:
        transposed: whether the transpose of dW is added, as for embeddings and for linear layers stored as (in, out).
        magnitude: DoRA's norms ``[rows]``, to which the rows of ``W + dW`` are then scaled (https://arxiv.org/abs/2402.09353).
        init: "pissa" (https://arxiv.org/abs/2404.02948) or "olora" (https://arxiv.org/abs/2406.01775) where the initial
            ``scale B A`` was subtracted from the base; else "".
        experts: how many matrices the weight stacks, one per expert. A is ``[experts r, columns]``, B ``[rows, r experts]``.
    """

    a: Stored
    b: Stored
    scale: float
    transposed: bool = False
    magnitude: Stored | None = None
    init: str = ""
    experts: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that they change."""
        sides = (self.b.shape[0], self.a.shape[1])
        matrix = sides[::-1] if self.transposed else sides
        return matrix if self.experts == 1 else (self.experts, *matrix)

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def plain(self) -> bool:
        """Whether the change is ``scale B A`` of a single matrix and nothing else."""
        return not (self.transposed or self.magnitude or self.init or self.experts > 1)


class Shift(NamedTuple):
    """The change of a bias: ``scale by`` is added to it; ``by`` has the bias's shape."""

    by: Stored
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.by.shape

    @property
    def stored(self) -> tuple[Stored, ...]:
        return (self.by,)


Change = Factors | Shift


@dataclass(frozen=True)
class Adapter:
    """An adapter as its directory holds it.

    Attributes:
        config: adapter_config.json.
        factors: low-rank changes, by the name of the weight that they change.
        shifts: changes of biases, by the bias's name.
        replaced: whole tensors that replace the base's, by name.
        parameters: factors of ``target_parameters``, by the module's name. Which of the module's parameters each one changes is
            found from the base's shapes.
    """

    path: Path
    config: dict[str, Any]
    factors: dict[str, Factors]
    shifts: dict[str, Shift]
    replaced: dict[str, Stored]
    parameters: dict[str, list[Factors]]


def is_adapter(path: Path) -> bool:
    return (path / CONFIG).is_file()


def read_adapter(path: Path) -> Adapter:
    """Read the adapter in a directory.

    Raises:
        UserError: when its files are malformed, or for the first key or tensor that is not supported.
    """
    config = checked(path / CONFIG, read_json(path / CONFIG))
    parts: dict[str, dict[str, Stored]] = {}
    replaced: dict[str, Stored] = {}
    for name, stored in read_header(path / WEIGHTS).tensors.items():
        found = NAMES.fullmatch(name.removeprefix(PREFIX))
        if found is not None:
            parts.setdefault(found["stem"], {})[found["part"].removesuffix(".weight")] = stored
        elif ".lora_" in name or ".token_adapter." in name:
            raise UserError(f"{path / WEIGHTS}: the tensor {shown(name)} is not supported")
        else:
            replaced[name.removeprefix(PREFIX).replace(".base_layer.", ".")] = stored
    adapter = Adapter(path, config, {}, {}, replaced, {})
    for stem, held in parts.items():
        place(adapter, stem, held)
    return adapter


def checked(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The configuration, after a check that every key of it is supported."""
    if config.get("peft_type", "LORA") != "LORA":
        raise UserError(f"{path}: peft_type must be LORA, got {config.get('peft_type')!r}")
    for key, value in config.items():
        if key not in (*UNDERSTOOD, *WITHOUT_EFFECT) and value:
            raise UserError(f"{path}: {shown(key)} is not supported, got {shown(value)}")
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UserError(f"{path}: bias must be none, all or lora_only, got {shown(config['bias'])}")
    init = config.get("init_lora_weights", True)
    if init not in (*PLAIN_INITS, *RESIDUAL_INITS):
        known = ", ".join(str(value).lower() for value in (*PLAIN_INITS[1:3], *PLAIN_INITS[4:], *RESIDUAL_INITS))
        raise UserError(
            f"{path}: init_lora_weights must be one of {known}, got {shown(init)}, which changes the base in a way that the "
            "adapter does not record; save it converted to plain LoRA (path_initial_model_for_weight_conversion)"
        )
    for key in ("rank_pattern", "alpha_pattern"):
        table = config.get(key) or {}
        if not isinstance(table, dict) or not all(is_positive(value, key == "rank_pattern") for value in table.values()):
            raise UserError(f"{path}: {key} must map patterns to numbers > 0, got {shown(table)}")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not is_positive(rank, True) or isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise UserError(f"{path} must have r >= 1 and a lora_alpha, got {shown(rank)} and {shown(alpha)}")
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise UserError(f"{path}: target_parameters must be a list of names, got {shown(targets)}")
    return config


def is_positive(value: Any, whole: bool) -> bool:
    return isinstance(value, int if whole else int | float) and not isinstance(value, bool) and value > 0


def place(adapter: Adapter, stem: str, held: dict[str, Stored]) -> None:
    """Check the tensors of one module and put them into the adapter.

    Args:
        stem: the module's name.
        held: its tensors by their part of the name, such as "lora_A".
    """
    where, embedding = f"{adapter.path / WEIGHTS}: {shown(stem)}", "lora_embedding_A" in held
    sides = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    a, b = (held.pop(side, None) for side in sides)
    if a is None or b is None:
        raise UserError(f"{where} must have both {sides[0]} and {sides[1]}")
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise UserError(
            f"{where}: {sides[0]} and {sides[1]} must be [r, columns] and [rows, r], got {list(a.shape)} and {list(b.shape)}"
        )
    magnitude, bias = held.pop("lora_magnitude_vector", None), held.pop("lora_B.bias", None)
    if held:
        raise UserError(f"{where}: {next(iter(held))} belongs to another kind of module")
    config = adapter.config
    if bool(config.get("use_dora")) != (magnitude is not None):
        found = "is there" if magnitude is not None else "is missing"
        raise UserError(f"{where}: lora_magnitude_vector {found}, but {CONFIG} says use_dora = {bool(config.get('use_dora'))}")
    if (magnitude is not None and magnitude.shape != b.shape[:1]) or (bias is not None and bias.shape != b.shape[:1]):
        raise UserError(f"{where}: lora_B.bias and lora_magnitude_vector must have lora_B's {b.shape[0]} rows")
    transposed, init = embedding or bool(config.get("fan_in_fan_out")), config.get("init_lora_weights")
    init = init if init in RESIDUAL_INITS else ""
    if magnitude is not None and transposed:
        raise UserError(f"{where}: use_dora is not supported on embeddings or with fan_in_fan_out")
    if init and transposed:
        raise UserError(f"{where}: init_lora_weights = {init} is not supported on embeddings or with fan_in_fan_out")
    rank = pattern_value(adapter, "rank_pattern", stem, config["r"])
    factors = Factors(a, b, scale_of(adapter, stem, rank), transposed, magnitude, init)
    if config.get("target_parameters"):
        adapter.parameters.setdefault(stem.replace(".base_layer", ""), []).append(factors)
        return
    if a.shape[0] != rank:
        raise UserError(f"{where} has rank {a.shape[0]}, but {CONFIG} says {rank}")
    adapter.factors[f"{stem}.weight"] = factors
    if bias is not None:
        adapter.shifts[f"{stem}.bias"] = Shift(bias, factors.scale)


def scale_of(adapter: Adapter, name: str, rank: int) -> float:
    """``alpha / r``, or ``alpha / sqrt(r)`` with rank-stabilised LoRA (https://arxiv.org/abs/2312.03732)."""
    alpha = pattern_value(adapter, "alpha_pattern", name, adapter.config["lora_alpha"])
    return alpha / (rank**0.5 if adapter.config.get("use_rslora") else rank)


def pattern_value(adapter: Adapter, key: str, name: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in PEFT's get_pattern_key."""
    for pattern, value in (adapter.config.get(key) or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", name):
                return value
        except re.error as error:
            raise UserError(
                f"{adapter.path / CONFIG}: {key} must have regular expressions as keys, got {shown(pattern)}: {error}"
            ) from None
    return default
