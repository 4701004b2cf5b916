"""What an expert trains, the whole model or a LoRA adapter on it, and how either is saved for merging."""

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
"""The prefix that peft adds to the names of the model that it wraps."""


def with_lora(model: nn.Module, section: Lora, seed: int) -> nn.Module:
    """Add an adapter to the linear layers that the section names; only the adapter is trained.

    A is drawn with the seed and B is 0, so that the model's outputs do not change at first.

    Raises:
        UserError: when a target is not a linear layer of the model.
    """
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
    """The dtype in which the files of a model store most of its weights, such as "bfloat16"; float64 counts as float32."""
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
    """Save a model's directory, or an adapter's in PEFT's format.

    Args:
        whole: the full state by name, where the engine shards the model so that it does not hold it itself.
        dtype: in which a whole model is stored; an adapter is always float32.
    """
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
    """All parameters of a model in training as one float32 vector ``[n]``, with an adapter's change added to them.

    The parameters are in the model's order, under the names in its files, so that vectors of experts of one base can be
    merged.
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
        """A copy of the parameters, ``[n]``."""
        if not self.adapted:
            self.flat.pull()
            return self.flat.whole.clone()
        changes = self.changes()
        parts = [value + changes[name] if name in changes else value for name, value in self.parameters.items()]
        return torch.cat([part.reshape(-1).float() for part in parts])

    def changes(self) -> dict[str, Tensor]:
        """The change ``scale B A`` of each weight that has an adapter, by the weight's name."""
        from peft.tuners.lora import LoraLayer

        return {
            plain_name(f"{name}.weight"): module.get_delta_weight("default")  # pyright: ignore
            for name, module in self.model.named_modules()
            if isinstance(module, LoraLayer)
        }

    def of(self, tensors: dict[str, Tensor]) -> Tensor:
        """Another model's tensors as a vector ``[n]`` in the same order.

        Raises:
            UserError: when one is missing or has another shape.
        """
        for name, value in self.parameters.items():
            if name not in tensors or tensors[name].shape != value.shape:
                found = list(tensors[name].shape) if name in tensors else "no such tensor"
                raise UserError(f"the model to merge with must have {name} of shape {list(value.shape)}, got {found}")
        device = self.flat.whole.device
        return torch.cat([tensors[name].reshape(-1).to(device, torch.float32) for name in self.parameters])

    @contextlib.contextmanager
    def holding(self, theta: Tensor) -> Iterator[None]:
        """A context in which the model computes with the parameters ``theta [n]``; afterwards its own are restored exactly."""
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
        """Set the parameters, other than an adapter's, to ``theta [n]``."""
        at = 0
        for value in self.parameters.values():
            value.copy_(theta[at : at + value.numel()].view(value.shape))
            at += value.numel()
        self.flat.push()


def plain_name(name: str) -> str:
    """A parameter's name in the model's files, from its name inside peft's wrapper."""
    return name.removeprefix(INSIDE).replace(".base_layer.", ".")
