"""Runs of one rank in this process: seconds each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distmerge.config import toml
from distmerge.launch.ranks import Place
from distmerge.trainer.loop import train

BASE: dict[str, Any] = {
    "steps": 40,
    "mesh": {"device": "cpu"},
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "attention_dropout": 0.1,
        }
    },
    "data": {"source": "files", "sequence_length": 32, "eval_fraction": 0.2},
    "train": {"batch_size": 4, "threads": 1},
    "optimizer": {"lr": 4e-3},
    "evaluate": {"every": 20, "sequences": 16},
    "checkpoint": {"every": 10, "keep": 4},
    "log": {"every": 1},
}


def write_text(folder: Path) -> Path:
    words = ["merge", "worker", "anchor", "delta", "moves", "the", "a", "of", "under"]
    lines = (" ".join(words[(index * step) % len(words)] for step in range(1, 12)) for index in range(7000))
    (folder / "text.txt").write_text("\n".join(lines))
    return folder / "text.txt"


def run(folder: Path, name: str, text: Path, **sections: Any) -> Path:
    """Train, or resume, the base configuration with ``sections`` in place of its own; the run's directory."""
    table = BASE | {"run_dir": str(folder / name)} | sections
    table["data"] = BASE["data"] | {"files": [str(text)]} | sections.get("data", {})
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(key, value)
        try:
            train(toml.validate(table), Place(0, 1, 0, 1), ["test"])
        finally:
            if dist.is_initialized():  # a run that was refused leaves the group, as its process would end
                dist.destroy_process_group()
    return folder / name


def parameters(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(run_dir: Path, file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / file).read_text().splitlines()]


def forget_after(run_dir: Path, step: int) -> None:
    """As if the job had died after the checkpoint of ``step``."""
    for path in (run_dir / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    (run_dir / "summary.json").unlink(missing_ok=True)
