"""Small model directories for the tests, made without transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "model.embed_tokens.weight": (300, 64),
    "model.layers.0.mlp.up_proj.weight": (1400, 401),
    "model.layers.0.input_layernorm.weight": (64,),
    "model.layers.1.mlp.up_proj.weight": (1400, 401),
    "model.layers.1.input_layernorm.weight": (64,),
    "model.norm.weight": (1,),
    "lm_head.weight": (300, 64),
}
"""A tensor has more than one block, an odd size, one element."""


def tensors(seed: int, dtype: torch.dtype = torch.bfloat16, near: dict[str, torch.Tensor] | None = None):
    """Random tensors; with ``near``, those plus a little."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    if near is None:
        return {name: (0.02 * value).to(dtype) for name, value in noise.items()}
    return {name: (near[name].float() + 0.003 * value).to(dtype) for name, value in noise.items()}


def write(path: Path, content: dict[str, torch.Tensor], shards: int = 1, config: dict | None = None) -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config or {"vocab_size": 300, "num_hidden_layers": 2}))
    if shards == 1:
        save_file(content, path / "model.safetensors")
        return path
    names = sorted(content)
    home = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
    for file in set(home.values()):
        save_file({name: content[name] for name in names if home[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    return path


def family(root: Path, dtype: torch.dtype = torch.bfloat16, members: int = 2, shards: int = 1) -> list[Path]:
    """A base and models near it."""
    base = tensors(0, dtype)
    paths = [write(root / "base", base, shards)]
    return paths + [write(root / f"m{i}", tensors(i + 1, dtype, base), shards) for i in range(members)]
