"""The section of the engine, and checks of combinations that engines do not support. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from distmerge.config.section import Section
from distmerge.errors import UserError


class EngineSettings(Section):
    kind: Literal["torch", "fsdp", "deepspeed"] = "torch"
    """How one worker computes and stores its parameters. torch: a replica on each rank, with DDP if the worker has several;
    fsdp: FSDP2 over the worker's ranks; deepspeed: ZeRO 0 to 3 over the worker's ranks."""
    reshard_after_forward: bool = True
    """Free a block's gathered parameters after its forward pass and gather them again for its backward pass (fsdp)."""
    config: dict[str, Any] = Field(default={})
    """DeepSpeed's configuration, as a table or the path of a JSON file (deepspeed). Values of [train] need not be repeated."""

    @model_validator(mode="before")
    @classmethod
    def read_file(cls, values: Any) -> Any:
        """Replace the path of a file by its contents, so that the run directory records the configuration itself."""
        if isinstance(values, dict) and isinstance(values.get("config"), str):
            return values | {"config": read_json(values["config"])}
        return values

    @model_validator(mode="after")
    def consistent(self) -> EngineSettings:
        if self.config and self.kind != "deepspeed":
            raise UserError(f'config must not be given if kind is not "deepspeed", got {sorted(self.config)} with {self.kind}')
        if not self.reshard_after_forward and self.kind != "fsdp":
            raise UserError(f'reshard_after_forward must be true if kind is not "fsdp", got false with {self.kind}')
        zero = self.config.get("zero_optimization", {})
        tables = {key: self.config[key] for key in ("zero_optimization", "bf16", "fp16") if key in self.config}
        if isinstance(zero, dict):
            tables |= {f"zero_optimization.{key}": zero[key] for key in ("offload_optimizer", "offload_param") if key in zero}
        for key, value in tables.items():
            if not isinstance(value, dict):
                raise UserError(f"config.{key} must be a table, got {value!r}")
        return self

    @property
    def stage(self) -> int:
        """DeepSpeed's ZeRO stage, 0 to 3."""
        return self.config.get("zero_optimization", {}).get("stage", 0)

    @property
    def offloads(self) -> bool:
        """Whether DeepSpeed keeps the optimizer in host memory."""
        return self.config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") == "cpu"


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON object. Keys whose value is null are removed, since TOML cannot represent them.

    Raises:
        UserError: if the file cannot be read or is not a JSON object.
    """
    try:
        table = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"config cannot be read from {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"config must be a JSON file, but {path} is not valid JSON: {error}") from None
    if not isinstance(table, dict):
        raise UserError(f"config must be a JSON object, got {type(table).__name__} in {path}")
    return without_null(table)


def without_null(table: dict[str, Any]) -> dict[str, Any]:
    return {key: without_null(value) if isinstance(value, dict) else value for key, value in table.items() if value is not None}


def check_engine(config: Any) -> None:
    """Refuse settings that the engine does not support, and a DeepSpeed configuration that contradicts other sections.

    Args:
        config: the whole TrainConfig.

    Raises:
        UserError: naming the key.
    """
    kind = config.engine.kind
    if kind == "torch":
        return
    for key, unset in (("window", None), ("preview", None)):
        if getattr(config, key) is not unset:
            raise UserError(
                f'engine.kind must be "torch" with a [{key}], which reads whole parameters on each rank, got "{kind}"'
            )
    whole = {
        "stopping.rule": ("merged", config.stopping.rule == "merged"),
        "examples.track": ("true", config.examples.track),
        "expert.lora": ("given", config.expert is not None and config.expert.lora is not None),
    }
    for key, (value, given) in whole.items():
        if given:
            raise UserError(f'engine.kind must be "torch" if {key} is {value}, which needs whole tensors, got "{kind}"')
    if kind == "deepspeed" and config.data.format != "text":
        raise UserError(f'data.format must be "text" if engine.kind is "deepspeed", got "{config.data.format}"')
    if config.recovery.enabled:
        raise UserError(f'engine.kind must be "torch" with recovery.enabled, which reads whole parameters, got "{kind}"')
    if config.train.compile:
        raise UserError(f'train.compile must be false if engine.kind is "{kind}", got true')
    if config.optimizer.name != "adamw":
        raise UserError(
            f'optimizer.name must be "adamw" if engine.kind is "{kind}", since Muon needs whole matrices, '
            f'got "{config.optimizer.name}"'
        )
    if kind == "deepspeed":
        check_deepspeed(config)


def check_deepspeed(config: Any) -> None:
    """Refuse keys of DeepSpeed's configuration that contradict other sections, and features that are not supported.

    Raises:
        UserError: naming the key.
    """
    table, train = config.engine.config, config.train
    for key in ("optimizer", "scheduler"):
        if key in table:
            ours = "optimizer" if key == "optimizer" else "schedule"
            raise UserError(f"engine.config.{key} must not be given, since [{ours}] decides, got {table[key]}")
    for key, name, ours in values_from_train(config):
        if table.get(key, "auto") not in ("auto", ours):
            raise UserError(f"engine.config.{key} must be {ours}, as train.{name} is, got {table[key]}")
    bfloat16 = train.precision == "bfloat16"
    for key, wanted in (("bf16", bfloat16), ("fp16", False)):
        enabled = table.get(key, {}).get("enabled", "auto")
        if enabled not in ("auto", wanted):
            raise UserError(
                f"engine.config.{key}.enabled must be {str(wanted).lower()}, as train.precision is {train.precision}, "
                f"got {str(enabled).lower()}"
            )
    zero = table.get("zero_optimization", {})
    if config.engine.stage not in (0, 1, 2, 3):
        raise UserError(f"engine.config.zero_optimization.stage must be one of 0, 1, 2, 3, got {config.engine.stage}")
    if (device := zero.get("offload_optimizer", {}).get("device", "none")) not in ("none", "cpu"):
        raise UserError(
            f'engine.config.zero_optimization.offload_optimizer.device must be "none" or "cpu", where merges reach, '
            f'got "{device}"'
        )
    if (device := zero.get("offload_param", {}).get("device", "none")) != "none":
        raise UserError(
            f'engine.config.zero_optimization.offload_param.device must be "none": merging parameters that are offloaded '
            f'is not verified yet, got "{device}"'
        )


def values_from_train(config: Any) -> list[tuple[str, str, float]]:
    """The settings that DeepSpeed's configuration shares with [train]: DeepSpeed's name, the key in [train], and the value."""
    train = config.train
    return [
        ("train_micro_batch_size_per_gpu", "batch_size", train.batch_size),
        ("gradient_accumulation_steps", "gradient_accumulation", train.gradient_accumulation),
        ("gradient_clipping", "gradient_clip", train.gradient_clip),
    ]
