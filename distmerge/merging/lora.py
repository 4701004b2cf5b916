"""LoRA adapters made of adapters, or of two models: ``cat`` (exact), ``svd`` (to a rank), ``extract``.

``cat`` stacks the factors: ``sum_m w_m s_m B_m A_m = [w_1 s_1 B_1 ...] [A_1; ...]``. Averaging A and B apart is something else:
it has cross terms. Inner products of adapters need r x r matrices only: ``<dW_i, dW_j> = s_i s_j tr((B_i^T B_j)(A_j A_i^T))``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distmerge.errors import UserError
from distmerge.files.adapters import CONFIG, PREFIX, WEIGHTS, Adapter, Factors, is_adapter, read_adapter
from distmerge.files.digests import Digests
from distmerge.files.layout import shard
from distmerge.files.models import TOKENIZER_FILES, carried
from distmerge.files.output import RECORD, Output
from distmerge.files.sources import NAMES, Maps, OnDisk, Source
from distmerge.merging.diagnosis import AdapterSimilarity
from distmerge.merging.models import open_any
from distmerge.merging.options import MergeOptions
from distmerge.merging.recipe import SHARD_SIZE, Entry, Recipe
from distmerge.merging.record import Hashes, as_json
from distmerge.merging.results import MergeResult
from distmerge.rules.parameters import checked
from distmerge.rules.protocol import spans
from distmerge.rules.random_masks import key_of, uniform
from distmerge.rules.torch_typed import qr, svd, to_list
from distmerge.theta.layers import place_of

WHOLE = ("weight", "1")
"""The weight of a model that was given none on the command line."""

Pair = tuple[Tensor, Tensor]
"""B [rows, r] with the scale in it, A [r, columns]; float32."""


def merge_adapters(recipe: Recipe, out: Path, options: MergeOptions) -> MergeResult:
    """Write the adapter that ``cat``, ``svd`` or ``extract`` makes.

    Raises:
        UserError: when an input is no adapter, the adapters do not fit, or a rank is missing.
    """
    check_takes(recipe, options)
    entries = list(recipe.slices[0].entries)
    rank = options.rank or 0
    if recipe.method != "cat" and rank < 1:
        raise UserError(f"{recipe.method} needs --rank >= 1, got {options.rank}")
    started = time.monotonic()
    maps = Maps()
    config: dict[str, Any] = {}
    if recipe.method == "extract":
        found = extract(recipe, entries, rank, options.allow_pickle, maps)
        beside = open_any(str(recipe.base), options.allow_pickle).directory
    else:
        adapters = [adapter_of(entry) for entry in entries]
        weights = [checked("weight", entry.parameters.get("weight", 1.0), entry.model) for entry in entries]
        found, config, beside = combine(adapters, weights, maps), adapters[0].config, adapters[0].path
        if recipe.method == "svd":
            found = {name: truncated(*pair, rank) for name, pair in found.items()}
    config = config | {"base_model_name_or_path": recipe.base or config.get("base_model_name_or_path")}
    outputs = write_adapter(found, config, recipe, out, carried(beside, TOKENIZER_FILES))
    size = sum(int(entry["bytes"]) for entry in outputs.values())
    return MergeResult(out, recipe.method, "adapter", len(found), size, time.monotonic() - started, outputs, {})


def check_takes(recipe: Recipe, options: MergeOptions) -> None:
    """Refuse what an adapter has no use for, by name.

    Raises:
        UserError: for the first such key.
    """
    own = [key for entry in recipe.slices[0].entries for key in entry.parameters]
    if recipe.method == "extract":
        own = [key for entry in recipe.slices[0].entries for key, value in entry.parameters.items() if (key, value) != WHOLE]
    given = [*recipe.parameters, *recipe.variants, *(key for key in own if recipe.method == "extract" or key != "weight")]
    given += [key for key in ("dtype", "out_dtype", "tokenizer", "chat_template", "general") if getattr(recipe, key)]
    given += ["report"] * options.report + ["stochastic"] * (options.stochastic is not None)
    given += ["shard-size"] * (options.shard_size != SHARD_SIZE) + ["device"] * (options.device != "cpu")
    given += ["rank"] * (recipe.method == "cat" and options.rank is not None)
    if given or len(recipe.slices) > 1:
        takes = {"cat": "models and weights", "svd": "models, weights and --rank", "extract": "a base, a model and --rank"}
        raise UserError(f"{recipe.method} makes an adapter of {takes[recipe.method]}, got {(given or ['slices'])[0]}, too")


def adapter_of(entry: Entry) -> Adapter:
    if not is_adapter(Path(entry.model)):
        raise UserError(f"{entry.model} is not a LoRA adapter: it has no {CONFIG}")
    adapter = read_adapter(Path(entry.model))
    more = [*adapter.shifts, *adapter.replaced, *adapter.parameters]
    more += [name for name, factors in adapter.factors.items() if not factors.plain]
    if more:
        raise UserError(f"{entry.model} does more to {more[0]} than add B A: merge it with its base instead, as BASE+ADAPTER")
    return adapter


def combine(adapters: list[Adapter], weights: list[float], maps: Maps) -> dict[str, Pair]:
    """The exact weighted sum, by factors put side by side. Where an adapter does not change a weight, its part is 0."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter.factors)
    found: dict[str, Pair] = {}
    for name in names:
        sides: list[Pair] = []
        for adapter, weight in zip(adapters, weights, strict=True):
            if name in adapter.factors:
                sides.append(loaded(adapter.factors[name], maps, weight))
        if len({(b.shape[0], a.shape[1]) for b, a in sides}) > 1:
            raise UserError(f"{name} has different shapes in {', '.join(str(adapter.path) for adapter in adapters)}")
        found[name] = torch.cat([b for b, _ in sides], 1), torch.cat([a for _, a in sides], 0)
    return found


def loaded(factors: Factors, maps: Maps, weight: float = 1.0) -> Pair:
    a, b = (whole(OnDisk(part, maps)) for part in (factors.a, factors.b))
    return b * (factors.scale * weight), a


def whole(source: OnDisk) -> Tensor:
    return source.read(0, source.stored[0].numel).view(source.shape).float()


def truncated(b: Tensor, a: Tensor, rank: int) -> Pair:
    """The best approximation of ``B A`` of the given rank, from a QR of both factors and an SVD of an r x r matrix."""
    left, core_left = qr(b.double())
    right, core_right = qr(a.double().T)
    u, s, v = svd(core_left @ core_right.T)
    root = s[:rank].sqrt()
    return (left @ (u[:, :rank] * root)).float(), ((v[:rank] * root.unsqueeze(1)) @ right.T).float()


def inner_products(adapters: list[dict[str, Pair]]) -> Tensor:
    """``[M, M]`` float64: ``<dW_i, dW_j>`` summed over the weights, from r x r matrices."""
    gram = torch.zeros(len(adapters), len(adapters), dtype=torch.float64)
    for i, one in enumerate(adapters):
        for j, two in enumerate(adapters):
            for name in one.keys() & two.keys():
                (b, a), (d, c) = one[name], two[name]
                gram[i, j] += ((b.double().T @ d.double()) * (a.double() @ c.double().T)).sum()
    return gram


def similarity(adapters: list[dict[str, Factors]], maps: Maps) -> AdapterSimilarity:
    """Norms of the adapters' changes and cosines between them, from r x r matrices."""
    gram = inner_products([{name: loaded(factors, maps) for name, factors in one.items()} for one in adapters])
    norms = gram.diagonal().clamp(min=0).sqrt()
    cosines = gram / (norms.unsqueeze(1) * norms).clamp(min=torch.finfo(torch.float64).tiny)
    return AdapterSimilarity(to_list(norms), to_list(cosines))


def extract(recipe: Recipe, entries: list[Entry], rank: int, allow_pickle: bool, maps: Maps) -> dict[str, Pair]:
    """The adapter of the given rank that is nearest to ``model - base``, for every matrix in a layer."""
    if recipe.base is None or len(entries) != 1:
        raise UserError("extract needs a base and one model")
    base, model = (open_any(reference, allow_pickle) for reference in (recipe.base, entries[0].model))
    found: dict[str, Pair] = {}
    for name, stored in base.tensors.items():
        if name not in model.tensors or model.tensors[name].shape != stored.shape:
            raise UserError(f"{name} is not the same in {base.reference} and {model.reference}")
        if len(stored.shape) == 2 and in_linear_layer(name) and min(stored.shape) > rank:
            left, right = leading_factors(OnDisk(model.tensors[name], maps), OnDisk(stored, maps), stored.shape, rank)
            found[name] = left, right
    if not found:
        raise UserError(f"{base.reference} has no matrix in .layers.N. with both sides above --rank {rank}")
    return found


def in_linear_layer(name: str) -> bool:
    """Whether a matrix belongs to a block of a list called ``layers``. Models that call it otherwise, such as GPT-2, may store
    their matrices transposed, which the files do not tell."""
    place = place_of(name)
    return place is not None and place.list.endswith(".layers.")


def leading_factors(member: Source, base: Source, shape: tuple[int, ...], rank: int) -> Pair:
    """``U [rows, rank]`` orthonormal and ``U^T (member - base) [rank, columns]``: the leading part of a task vector.

    A randomised range of twice the rank with one power iteration, block by block of whole rows.
    Source: Halko, Martinsson, Tropp, https://arxiv.org/abs/0909.4061
    """
    rows, columns = shape
    width = min(2 * rank, rows, columns)
    cuts = list(spans(rows * columns, columns))

    def delta(start: int, stop: int) -> Tensor:
        return (member.read(start, stop).float() - base.read(start, stop).float()).view(-1, columns)

    test = (uniform(key_of("range", shape), 0, columns * width) - 0.5).float().view(columns, width)
    found = test
    for _ in range(2):
        found, _ = qr(torch.cat([delta(a, b) @ test for a, b in cuts]))
        test = torch.zeros_like(test)
        for a, b in cuts:
            test += delta(a, b).T @ found[a // columns : b // columns]
    left, _, _ = svd(test.T, full_matrices=False)
    return (found @ left)[:, :rank], (left.T @ test.T)[:rank]


def write_adapter(found: dict[str, Pair], config: dict[str, Any], recipe: Recipe, out: Path, more: dict[str, bytes]) -> Hashes:
    """Write the adapter's directory, with the files ``more``. Scales are in B, so alpha is r; ranks differ only in ``cat``.

    Returns:
        the hashes of the file that holds its tensors.
    """
    rank = max(b.shape[1] for b, _ in found.values())
    tensors: dict[str, Tensor] = {}
    for name, (b, a) in found.items():
        stem = PREFIX + name.removesuffix(".weight")
        pad = rank - b.shape[1]  # PEFT knows one rank: zeros fill up the others
        tensors[f"{stem}.lora_A.weight"] = torch.cat([a, a.new_zeros(pad, a.shape[1])]).contiguous()
        tensors[f"{stem}.lora_B.weight"] = torch.cat([b, b.new_zeros(b.shape[0], pad)], 1).contiguous()
    modules = sorted({name.removesuffix(".weight").rpartition(".")[2] for name in found})
    kept = {"task_type": "CAUSAL_LM", "bias": "none"} | {
        key: config[key] for key in ("task_type", "base_model_name_or_path") if config.get(key)
    }
    said = kept | {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    place = shard({name: (NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()}, 0, 1)._replace(
        name=WEIGHTS
    )
    output = Output(out, json.dumps([recipe.method, sorted(tensors)]) + "adapter", [place])
    for name, value in tensors.items():
        output.write(place, place.offsets[name], value.view(-1).view(torch.uint8).numpy().data)
    digests = Digests(1)
    digests.advance(output.path / WEIGHTS)
    outputs = {path.name: entry for path, entry in digests.finish().items()}
    record = {"tool": "distmerge", "recipe": {"method": recipe.method, "models": recipe.references}, "outputs": outputs}
    output.publish(more | {CONFIG: as_json(said), RECORD: as_json(record)})
    return outputs
