"""What an expert trains: the whole model, or a LoRA adapter on it; and how either is written so that merges read it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from distmerge.config.experts import Lora
from distmerge.errors import UserError
from distmerge.files.directories import write_file
from distmerge.files.header import FLOATS
from distmerge.files.models import open_model
from distmerge.files.sources import DTYPES
from distmerge.model import save_model
from distmerge.theta.flat import FlatParameters

INSIDE = "base_model.model."
"""What peft puts before the names of the model that it wraps."""


def with_lora(model: nn.Module, section: Lora, seed: int) -> nn.Module:
    """The model with an adapter on the linear layers that the section names; only the adapter trains. A is drawn from the
    seed, B is 0, so that the model computes what it did."""
    from peft import LoraConfig, get_peft_model  # slow to import, and only for this

    leaves = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for target in section.targets:
        if target not in leaves:
            raise UserError(f"config.expert.lora.targets must name linear layers of the model, {sorted(leaves)}, got {target}")
    torch.manual_seed(seed)
    config = LoraConfig(
        r=section.rank, lora_alpha=section.alpha,  # pyright: ignore[reportArgumentType]
        target_modules=list(section.targets), task_type="CAUSAL_LM",
        lora_dropout=0.0, bias="none",
    )  # fmt: skip
    return get_peft_model(model, config)  # pyright: ignore[reportArgumentType]


def is_adapted(model: nn.Module) -> bool:
    return hasattr(model, "peft_config")


def dtype_of(path: str) -> str:
    """The dtype of most of a model's weights, as its files hold them: "bfloat16"; float64 counts as float32."""
    counts: Counter[str] = Counter()
    with contextlib.suppress(UserError):  # transformers loads some directories that a merge would refuse
        for stored in open_model(path).tensors.values() if Path(path).is_dir() else ():
            counts[stored.dtype] += stored.numel if stored.dtype in FLOATS else 0
    if counts:
        dtype: Any = DTYPES[max(counts, key=counts.__getitem__)]
    else:
        dtype = AutoConfig.from_pretrained(path, trust_remote_code=False).dtype
    return str(dtype).removeprefix("torch.") if dtype in (torch.bfloat16, torch.float16) else "float32"


def save_expert(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    whole: dict[str, Tensor] | None = None,
    dtype: str = "float32",
) -> None:
    """A model directory in ``dtype``, or an adapter's in PEFT's format and float32; ``whole`` is the state where the model does
    not hold it."""
    if not is_adapted(model):
        save_model(model, tokenizer, directory, None if dtype == "float32" else dtype, whole)
        return
    from peft import get_peft_model_state_dict

    directory.mkdir(parents=True, exist_ok=True)
    found: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)  # pyright: ignore[reportArgumentType]
    write_file(directory / "adapter_model.safetensors", dict(sorted(found.items())))
    config: Any = model.peft_config["default"]  # pyright: ignore
    config.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class Theta:
    """All parameters of the model that is trained as one float32 vector ``[n]``, an adapter added in where there is one.

    The order is the model's own, under the names that its files have: vectors of experts of one base can be merged.
    """

    def __init__(self, model: nn.Module, flat: FlatParameters):
        self.model, self.flat = model, flat
        self.adapted = is_adapted(model)
        named = dict(model.named_parameters())
        plain = {plain_name(name): value for name, value in named.items() if ".lora_" not in name}
        self.parameters = plain if self.adapted else dict(flat.named_views())
        self.numel = sum(value.numel() for value in self.parameters.values())

    @torch.no_grad()
    def read(self) -> Tensor:
        """``[n]``, a copy."""
        if not self.adapted:
            self.flat.pull()
            return self.flat.whole.clone()
        changes = self.changes()
        parts = [value + changes[name] if name in changes else value for name, value in self.parameters.items()]
        return torch.cat([part.reshape(-1).float() for part in parts])

    def changes(self) -> dict[str, Tensor]:
        """``scale B A`` of each weight that has an adapter."""
        from peft.tuners.lora import LoraLayer

        return {
            plain_name(f"{name}.weight"): module.get_delta_weight("default")  # pyright: ignore
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        """``[n]``: another model's tensors in the same order.

        Raises:
            UserError: when one is missing or has another shape.
        """
        for name, value in self.parameters.items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise UserError(f"{name} is not the same in the model to merge with: {list(value.shape)} here")
        device = self.flat.whole.device
        return torch.cat([tensors[name].reshape(-1).to(device, torch.float32) for name in self.parameters])

    @contextlib.contextmanager
    def holding(self, theta: Tensor) -> Iterator[None]:
        """A stretch in which the model computes with ``theta [n]``. Afterwards every bit is as it was."""
        if not self.adapted:
            with self.flat.borrowed():
                self.write(theta)
                yield
            return
        own = {name: value.detach().clone() for name, value in self.parameters.items()}
        try:
            with self.model.disable_adapter(), torch.no_grad():  # pyright: ignore
                self.write(theta)
                yield
        finally:
            with torch.no_grad():
                for name, value in self.parameters.items():
                    value.copy_(own[name])

    @torch.no_grad()
    def write(self, theta: Tensor) -> None:
        """Let the parameters, but not an adapter, be ``theta [n]``."""
        at = 0
        for value in self.parameters.values():
            value.copy_(theta[at : at + value.numel()].view(value.shape))
            at += value.numel()
        self.flat.push()


def plain_name(name: str) -> str:
    """A parameter's name in the model's files, from its name in peft's wrapping."""
    return name.removeprefix(INSIDE).replace(".base_layer.", ".")
