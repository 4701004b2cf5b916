"""What the golden numbers are taken of: small runs that reach every merger, engine and axis, and merge recipes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODEL = {
    "model_type": "llama",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
}

STEPS = 40


@dataclass(frozen=True)
class Case:
    """A run: its ranks, its workers, and the sections that differ from the base configuration."""

    ranks: int
    workers: int
    sections: dict[str, Any] = field(default_factory=dict)

    def config(self, folder: Path, name: str) -> dict[str, Any]:
        """The whole configuration, for a TOML file. Two losses are evaluated and every second step is logged."""
        base: dict[str, Any] = {
            "run_dir": str(folder / name),
            "steps": STEPS,
            "mesh": {"workers": self.workers, "device": "cpu"},
            "model": {"config": MODEL},
            "data": {"source": "files", "files": [str(folder / "text.txt")], "sequence_length": 32, "eval_fraction": 0.2},
            "train": {"batch_size": 4, "threads": 1},
            "optimizer": {"lr": 4e-3},
            "evaluate": {"every": STEPS // 2, "sequences": 64},
            "checkpoint": {"every": STEPS // 2},
            "log": {"every": 2},
        }
        for key, value in self.sections.items():
            base[key] = base[key] | value if isinstance(value, dict) and key in base else value
        return base


def diloco(**keys: Any) -> dict[str, Any]:
    return {"merge": [{"kind": "diloco", "every": 8, "outer_lr": 0.7, "outer_momentum": 0.5} | keys]}


def zero(stage: int) -> dict[str, Any]:
    return {"engine": {"kind": "deepspeed", "config": {"zero_optimization": {"stage": stage}}}}


STREAMING = {
    "kind": "streaming-diloco", "every": 9, "fragments": 3, "mix": 0.5, "outer_lr": 0.4, "outer_momentum": 0.9
}  # fmt: skip
"""Written out, with the paper's mix and outer optimizer: the record is older than what the preset leaves open."""

WINDOW = {"window": {"every": 5, "blocks": 4}, "preview": {"every": 20, "last": 3}}

RUNS: dict[str, Case] = {
    "one worker": Case(1, 1),
    "muon": Case(1, 1, {"optimizer": {"name": "muon"}}),
    "data parallel": Case(2, 1),
    "no communication": Case(2, 2, {"merge": [{"kind": "none"}]}),
    "average": Case(2, 2, {"merge": [{"kind": "average", "every": 8}]}),
    "diloco": Case(2, 2, diloco()),
    "diloco of 3 workers in int8": Case(3, 3, diloco(wire="int8", error_feedback=True)),
    "diloco, token weights": Case(2, 2, diloco(rule="tokens")),
    "diloco, radial": Case(2, 2, diloco(rule="radial")),
    "diloco, sharded outer state": Case(2, 2, diloco(outer_sharded=True)),
    "streaming": Case(2, 2, {"merge": [STREAMING]}),
    "sparta": Case(2, 2, {"merge": [{"kind": "sparta", "fraction": 0.05}]}),
    "sparta, random and late": Case(
        2, 2, {"merge": [{"kind": "sparta", "fraction": 0.02, "selector": "random", "delay": 3, "wire": "bf16"}]}
    ),
    "sparta and diloco": Case(2, 2, {"merge": [{"kind": "sparta", "fraction": 0.02}, *diloco()["merge"]]}),
    "fsdp, 2 workers of 2 ranks": Case(4, 2, diloco() | {"engine": {"kind": "fsdp"}}),
    "ZeRO 1": Case(2, 2, diloco() | zero(1)),
    "ZeRO 3, 2 workers of 2 ranks": Case(4, 2, diloco() | zero(3)),
    "window and preview": Case(2, 2, diloco() | WINDOW | {"window": {"every": 8, "blocks": 4}}),
    "window, asynchronous checkpoints": Case(1, 1, WINDOW | {"checkpoint": {"async": True}}),
    "recovery that never acts": Case(2, 2, diloco() | {"recovery": {"enabled": True, "merge_last": 1}}),
}

EXPERTS: dict[str, Case] = {
    "expert": Case(1, 1, {"expert": {"skill": "words"}, "checkpoint": {"at": "powers-of-two"}}),
    "expert, adapter": Case(1, 1, {"expert": {"skill": "words", "lora": {"rank": 4, "alpha": 8.0}}}),
}
"""These start from the final model of "one worker"."""


def write_text(path: Path) -> None:
    """A text that a small model learns something of, the same on every machine."""
    words = ["merge", "worker", "anchor", "delta", "moves", "the", "a", "of", "under"]
    lines = (" ".join(words[(index * step) % len(words)] for step in range(1, 12)) for index in range(4000))
    path.write_text("\n".join(lines))


SHAPES = {
    "model.embed_tokens.weight": (96, 32),
    "model.layers.0.mlp.up_proj.weight": (160, 33),
    "model.layers.0.input_layernorm.weight": (32,),
    "model.layers.1.mlp.up_proj.weight": (160, 33),
    "model.layers.1.input_layernorm.weight": (32,),
    "model.norm.weight": (1,),
    "lm_head.weight": (96, 32),
}


def write_models(root: Path) -> None:
    """A base and three models near it, in bfloat16: odd sizes, one element."""
    generator = torch.Generator().manual_seed(0)
    base = {name: 0.02 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for name in ("base", "a", "b", "c"):
        noise = {key: torch.randn(shape, generator=generator) for key, shape in SHAPES.items()}
        tensors = {key: (base[key] + (0.003 * noise[key] if name != "base" else 0)).bfloat16() for key in SHAPES}
        (root / name).mkdir(parents=True)
        save_file(tensors, root / name / "model.safetensors")
        (root / name / "config.json").write_text(json.dumps({"vocab_size": 96, "num_hidden_layers": 2}))


def recipe(method: str, each: dict[str, Any] | None = None, members: str = "ab", base: bool = True, **shared: Any) -> Any:
    """A recipe in mergekit's form, with ``each`` model's parameters."""
    made: dict[str, Any] = {"merge_method": method, "models": [{"model": m, "parameters": each or {}} for m in members]}
    made |= {"base_model": "base"} if base else {}
    return made | ({"parameters": shared} if shared else {})


THIN = {"weight": 0.5, "density": 0.4}

RECIPES: dict[str, dict[str, Any]] = {
    "linear": recipe("linear", {"weight": 0.5}, base=False),
    "linear of 3, not normalised": recipe("linear", {"weight": 0.3}, "abc", base=False, normalize=False),
    "slerp": recipe("slerp", members="a", t=0.3) | {"models": [{"model": "base"}, {"model": "a"}]},
    "nuslerp": recipe("nuslerp", {"weight": 0.4}),
    "nuslerp by row": recipe("nuslerp", {"weight": 0.4}, nuslerp_flatten=False, nuslerp_row_wise=True),
    "task arithmetic": recipe("task_arithmetic", {"weight": 0.7}, "abc"),
    "task arithmetic, lambda": recipe("task_arithmetic", {"weight": 0.7}) | {"parameters": {"lambda": 0.5}},
    "ties": recipe("ties", THIN),
    "ties of 3, normalised": recipe("ties", THIN, "abc", normalize=True),
    "dare_linear": recipe("dare_linear", THIN),
    "dare_ties": recipe("dare_ties", THIN, "abc"),
    "della": recipe("della", THIN | {"epsilon": 0.1}),
    "della_linear": recipe("della_linear", THIN | {"epsilon": 0.1}, "abc"),
    "breadcrumbs": recipe("breadcrumbs", THIN | {"gamma": 0.02}),
    "breadcrumbs_ties": recipe("breadcrumbs_ties", THIN | {"gamma": 0.02}, "abc"),
    "model_stock": recipe("model_stock", members="abc"),
    "model_stock by row": recipe("model_stock", members="abc", filter_wise=True),
    "sce": recipe("sce", members="abc", select_topk=0.3),
    "passthrough": recipe("passthrough", {"scale": 1.5}, "a", base=False),
    "wise_ft": recipe("wise_ft", {"omega": 0.4}, "a"),
}

PAPER = ("ties", "dare_ties", "della", "breadcrumbs", "model_stock", "sce", "task arithmetic")
"""These are merged in the papers' form, too."""
