"""One function on several real ranks of this machine, and what each returned."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def on_ranks(function: Callable[..., Any], ranks: int, *arguments: Any, backend: str = "gloo") -> list[Any]:
    """``function(rank, *arguments)`` in ``ranks`` fresh processes of one thread each, joined by a process group.

    The function must be importable, and what it returns readable by ``torch.load(weights_only=True)``.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(enter, (function, ranks, arguments, folder, backend), nprocs=ranks)  # pyright: ignore
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(ranks)]


def enter(rank: int, function: Callable[..., Any], ranks: int, arguments: tuple[Any, ...], folder: str, backend: str) -> None:
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group(backend, rendezvous, rank=rank, world_size=ranks, timeout=timedelta(seconds=120))
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
