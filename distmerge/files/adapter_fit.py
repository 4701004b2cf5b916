"""Applies a LoRA adapter to its base model by name and shape: which tensors change, and whether all of them fit.

Imports no torch.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

from distmerge.errors import UserError
from distmerge.files.adapters import CONFIG, Adapter, Change, Factors, pattern_value, scale_of
from distmerge.files.header import FLOATS
from distmerge.files.models import Model
from distmerge.theta.layers import is_token_embedding, role_of

CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Architectures that store the weights of linear layers as (in, out): for these, and no others, fan_in_fan_out must be true."""


def with_adapter(base: Model, reference: str, adapter: Adapter) -> Model:
    """The base model as an adapter changes it. Nothing is computed before the tensors are read.

    Args:
        reference: what the user wrote for the adapter; errors name it.

    Raises:
        UserError: when the adapter does not fit the base.
    """
    changes: dict[str, Change] = {**adapter.factors, **adapter.shifts}
    for module, held in adapter.parameters.items():
        changes |= of_parameters(base, reference, adapter, module, held)
    for name, change in [*changes.items(), *adapter.replaced.items()]:
        if name not in base.tensors:
            tied = "; its embeddings are tied, and an adapter on them cannot be merged" if role_of(name) == "head" else ""
            raise UserError(f"{reference} changes {name}, which {base.reference} does not have{tied}")
        stored = base.tensors[name]
        if stored.shape != change.shape:
            raise UserError(f"{reference}: {name} has shape {list(change.shape)}, but {list(stored.shape)} in {base.reference}")
        if stored.dtype not in FLOATS:
            raise UserError(f"{reference} changes {name}, which is {stored.dtype} in {base.reference}")
        check_tied(base, reference, name)
    check_order(base, reference, adapter)
    return replace(base, reference=reference, tensors=base.tensors | adapter.replaced, factors=changes)


def check_tied(base: Model, reference: str, name: str) -> None:
    """Refuse an adapter on an embedding that is tied to the output layer: in its training the output layer did not change."""
    heads = [key for key in base.tensors if role_of(key) == "head" and key.endswith(".weight")]
    tied = base.config.get("tie_word_embeddings") or not heads
    if is_token_embedding(name) and tied:
        raise UserError(
            f"{reference} changes {name} of {base.reference}, whose embeddings are tied: the output layer would change as well"
        )


def check_order(base: Model, reference: str, adapter: Adapter) -> None:
    """Refuse factors in another orientation than the base's linear layers; the shapes of square matrices would not show it."""
    stored_in_out = base.config.get("model_type") in CONV1D
    if adapter.factors and "model_type" in base.config and bool(adapter.config.get("fan_in_fan_out")) != stored_in_out:
        raise UserError(
            f"{adapter.path / CONFIG}: fan_in_fan_out must be {str(stored_in_out).lower()} for an adapter of "
            f"{base.config['model_type']} models, such as {base.reference}"
        )


def of_parameters(base: Model, reference: str, adapter: Adapter, module: str, held: list[Factors]) -> dict[str, Change]:
    """What an adapter changes of a module's parameters (``target_parameters``), such as the stacked experts of an MoE layer.

    PEFT saves the adapters of several parameters of one module without the parameters' names, so that only the shapes tell
    which factors belong to which parameter.

    Args:
        module: the module's name.
        held: its factors, in the order of the file.

    Returns:
        the factors by the name of the tensor that they change.

    Raises:
        UserError: when no assignment of the factors to the tensors fits, or more than one does.
    """
    targets = adapter.config["target_parameters"]
    names = [
        name
        for name in base.tensors
        if name.rpartition(".")[0] == module and any(name == key or name.endswith(f".{key}") for key in targets)
    ]
    if not names:
        (plain, *more) = held
        rank = pattern_value(adapter, "rank_pattern", module, adapter.config["r"])
        if more or plain.a.shape[0] != rank or f"{module}.weight" not in base.tensors:
            raise UserError(f"{reference} changes parameters of {module} that {base.reference} does not hold under that name")
        return {f"{module}.weight": plain}
    fits = [
        {name: factors for name, factors in zip(order, found, strict=True) if factors is not None}
        for order in permutations(names, len(held))
        for found in [[stacked(base, adapter, name, one) for name, one in zip(order, held, strict=True)]]
        if all(factors is not None for factors in found)
    ]
    if len(fits) != 1:
        said = "fit none" if not fits else "fit more than one"
        raise UserError(f"{reference}: the adapters of {module} {said} of the tensors {', '.join(names)} of {base.reference}")
    return dict(fits[0])


def stacked(base: Model, adapter: Adapter, name: str, factors: Factors) -> Factors | None:
    """The factors as a change of the tensor ``name``, a matrix or a stack of one matrix per expert; None if they do not fit.

    Raises:
        UserError: when both orientations fit; only the model's code knows which one is right.
    """
    shape = base.tensors[name].shape
    rank = pattern_value(adapter, "rank_pattern", name, adapter.config["r"])
    experts = shape[0] if len(shape) == 3 else 1
    if factors.init or factors.magnitude or factors.transposed or factors.a.shape[0] != rank * experts:
        return None
    own = factors._replace(experts=experts, scale=scale_of(adapter, name, rank))
    ways = (own, own._replace(transposed=True)) if experts > 1 else (own,)
    fitting = [way for way in ways if way.shape == shape]
    if len(fitting) > 1:
        raise UserError(f"{adapter.path}: the shape {list(shape)} of {name} could be (in, out) as well as (out, in)")
    return fitting[0] if fitting else None
