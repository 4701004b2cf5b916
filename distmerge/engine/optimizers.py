"""Builds the inner optimizers that the configuration names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from distmerge.config.train import Optimizer


def build_optimizers(model: nn.Module, section: Optimizer) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon (https://kellerjordan.github.io/posts/muon/) for the hidden matrices and AdamW for the rest. Weight decay
    applies only to tensors with two or more dimensions."""
    groups = parameter_groups(model, section.weight_decay)
    optimizers: list[torch.optim.Optimizer] = []
    if section.name == "muon":
        excluded = {id(p) for p in embeddings_and_head(model)}
        hidden = [p for group in groups for p in group["params"] if p.ndim == 2 and id(p) not in excluded]
        taken = {id(p) for p in hidden}
        groups = [group | {"params": [p for p in group["params"] if id(p) not in taken]} for group in groups]
        # Muon's updates are scaled to the RMS of AdamW's, so that one learning rate suits both.
        optimizers.append(
            torch.optim.Muon(hidden, lr=section.lr, weight_decay=section.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    adamw = torch.optim.AdamW([g for g in groups if g["params"]], lr=section.lr, betas=section.betas, fused=True)
    return [*optimizers, adamw]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: those with two or more dimensions have weight decay, the others have none."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def embeddings_and_head(model: nn.Module) -> Iterator[nn.Parameter]:
    """The weights of the embeddings and of the head, which Muon must not train: they are not hidden matrices."""
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # pyright: ignore
        if module is not None:
            yield module.weight
