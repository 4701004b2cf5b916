"""Refuses parameters that cannot be laid out in one vector, or that were replaced after they were laid out."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distmerge.errors import UserError


def check_identity(model: nn.Module, names: Sequence[str], parameters: Sequence[Tensor]) -> None:
    """Refuse a model whose trainable parameters are not the same objects that were laid out under these names.

    Otherwise parameters that have replaced them would never be merged, and the workers would silently drift apart.

    Raises:
        UserError: naming a parameter that was replaced, added, unfrozen, frozen or removed.
    """
    present = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if len(present) == len(parameters) and all(map(operator.is_, present, parameters)):
        return
    laid_out = dict(zip(names, parameters, strict=True))
    there = dict(model.named_parameters(remove_duplicate=False))
    known = {id(parameter) for parameter in parameters}
    for name, parameter in there.items():
        if parameter.requires_grad and id(parameter) not in known:
            what = (
                "is not the one that the merger was made with: use load_state_dict() without assign=True, and make the merger "
                "after modules are replaced"
                if name in laid_out
                else "trains, but did not when the merger was made: make the merger after parameters are added or unfrozen"
            )
            raise UserError(f"parameter {name} {what}")
    kept = {id(parameter): parameter.requires_grad for parameter in there.values()}
    for name, parameter in laid_out.items():
        if not kept.get(id(parameter), False):
            what = "was frozen" if id(parameter) in kept else "was removed from the model"
            raise UserError(f"parameter {name} {what} after the merger was made: make a new merger")


def check_dtype(name: str, parameter: Tensor) -> None:
    """Refuse dtypes that float32, in which merges compute, cannot hold: float64 parameters would silently lose low bits.

    Raises:
        UserError: naming the parameter.
    """
    if not parameter.is_floating_point():
        raise UserError(f"parameter {name} must be floating point, got {parameter.dtype}")
    if parameter.dtype == torch.float64:
        raise UserError(
            f"parameter {name} must be float32, float16 or bfloat16, since merges compute in float32, got torch.float64"
        )


def check_parameters(named: list[tuple[str, nn.Parameter]]) -> None:
    """Refuse parameters that cannot be laid out in one vector.

    Raises:
        UserError: if there are none, or for one with a dtype that cannot be merged, on another device than the first, or in the
            same memory as another.
    """
    if not named:
        raise UserError("the model has no trainable parameter, so there is nothing to merge")
    seen: dict[int, str] = {}
    for name, parameter in named:
        check_dtype(name, parameter)
        if parameter.device != named[0][1].device:
            raise UserError(f"parameter {name} is on {parameter.device}, but {named[0][0]} on {named[0][1].device}")
        other = seen.setdefault(parameter.data_ptr(), name) if parameter.numel() else name
        if other != name:
            raise UserError(f"parameters {other} and {name} share memory but are two objects; tie them as one parameter object")
