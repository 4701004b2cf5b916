"""The plan that ``distmerge experts --dry-run`` prints, with the memory, tokens and disk space that it needs.

It is computed from configurations alone; no weights are read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from distmerge.config.experts import Lora
from distmerge.config.train import TrainConfig
from distmerge.errors import UserError
from distmerge.experts.adapt import dtype_of
from distmerge.experts.group import Plan
from distmerge.model import first_line

GB = 1e9
FULL_STATE = 16
"""Bytes on a rank for each trained parameter: the parameter, its gradient and AdamW's two moments, in float32."""


class Count(NamedTuple):
    """The number of all parameters of a model, and of those that are trained."""

    whole: int
    trained: int


def describe(plan: Plan) -> str:
    """The plan as text, with a paragraph for each expert."""
    lines = [f"{len(plan.runs)} experts, {plan.mode}"]
    if plan.mode == "side-by-side":
        lines[0] += f", {sum(plan.ranks)} ranks in one job"
    for run, ranks in zip(plan.runs, plan.ranks, strict=True):
        lines += expert(run, ranks)
    total = sum(tokens_of(run, ranks) for run, ranks in zip(plan.runs, plan.ranks, strict=True))
    base = plan.runs[0].expert and (plan.runs[0].expert.base or plan.runs[0].model.path)
    models = " ".join(f"--model {run.run_dir}/final" for run in plan.runs)
    method = "cat" if all(run.expert and run.expert.lora for run in plan.runs) else "auto"
    lines += ["", f"total tokens: {total:,}"]
    return "\n".join([*lines, "afterwards:", f"  distmerge merge --method {method} --base {base} {models} --out MERGED"])


def expert(run: TrainConfig, ranks: int) -> list[str]:
    """The paragraph of one expert."""
    assert run.expert is not None
    count = parameters(run)
    kind = "full finetuning" if run.expert.lora is None else f"LoRA of rank {run.expert.lora.rank}"
    rank_bytes = 4 * (count.whole - count.trained) + FULL_STATE * count.trained
    lines = [
        "",
        f"{run.expert.skill}: {kind} of {count.whole:,} parameters, {count.trained:,} of them trained",
        f"  ranks: {ranks}, each with {run.train.batch_size * run.train.gradient_accumulation} sequences of "
        f"{run.data.sequence_length} tokens per step",
        f"  tokens: {tokens_of(run, ranks):,} in {run.steps:,} steps",
        f"  memory per rank: {rank_bytes / GB:.1f} GB for parameters, gradients and moments; activations come on top",
    ]
    steps = published(run)
    if steps:
        size = 4 * count.trained if run.expert.lora else bytes_of(run) * count.whole
        lines.append(f"  published: {len(steps)} steps and the final model, {size * (len(steps) + 1) / GB:.1f} GB on disk")
    return lines + stopping(run, count, len(steps))


def bytes_of(run: TrainConfig) -> int:
    """The size in bytes of a parameter in the models that the run publishes."""
    assert run.model.path is not None
    return 4 if (run.checkpoint.dtype or dtype_of(run.model.path)) == "float32" else 2


def stopping(run: TrainConfig, count: Count, steps: int) -> list[str]:
    """When the expert stops, and what the merges that it watches cost, for ``steps`` published steps."""
    section = run.stopping
    if section.rule == "plateau":
        return [
            f"  stops: on a plateau of {section.patience} evaluations, after {section.reductions} earlier ones that lower the "
            "learning rate"
        ]
    if section.rule == "merged":
        members = len(section.merge_with) + 1
        vectors = members + 3  # the base, the merged model, and the trained parameters that it replaces meanwhile
        return [
            f"  merges: {steps} at most, {section.method} of {members} models, judged on {len(section.skills) + 1} skills; "
            f"{4 * count.whole * vectors / GB:.1f} GB more memory during each merge",
            f"  stops: when the merge has not improved at {section.patience} published steps, from step {section.after} on",
        ]
    return ["  stops: at the last step"]


def published(run: TrainConfig) -> list[int]:
    """The steps at which the run publishes its model."""
    every = run.checkpoint.every
    match run.checkpoint.at:
        case "powers-of-two":
            found = [1 << power for power in range(run.steps.bit_length()) if 1 << power <= run.steps]
        case "every":
            found = list(range(every, run.steps + 1, every))
        case None:
            return []
    return found if found and found[-1] == run.steps else [*found, run.steps]


def tokens_of(run: TrainConfig, ranks: int) -> int:
    """The tokens of the whole run, including padding."""
    return run.steps * run.train.batch_size * run.train.gradient_accumulation * run.data.sequence_length * ranks


def parameters(run: TrainConfig) -> Count:
    """The numbers of parameters, from the base's configuration, without any weights.

    Raises:
        UserError: when the configuration cannot be read, or transformers does not know its architecture.
    """
    assert run.model.path is not None and run.expert is not None
    path = Path(run.model.path)
    try:
        if path.is_dir():
            table: dict[str, Any] = json.loads((path / "config.json").read_text())
            config = AutoConfig.for_model(table.pop("model_type"), **table)
        else:
            config = AutoConfig.from_pretrained(run.model.path, trust_remote_code=False)
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"config.model.path must be a model whose config.json is here or in the hub's cache, got {run.model.path}: "
            f"{first_line(error)}"
        ) from None
    whole = sum(value.numel() for value in model.parameters())
    return Count(whole, whole if run.expert.lora is None else adapter_size(model, run.expert.lora))


def adapter_size(model: nn.Module, lora: Lora) -> int:
    """The number of an adapter's parameters."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.rpartition(".")[2] in lora.targets
    ]
    if not layers:
        raise UserError(f"config.expert.lora.targets must name linear layers of the model, got {', '.join(lora.targets)}")
    return sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)
