"""Writes the checkpoints in this directory with DeepSpeed itself: two ranks, ZeRO stages 2 and 3, two steps each.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 tests/checkpoints/zero/write.py 2

Kept in git, since DeepSpeed compiles an extension on the first call, which takes minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import deepspeed  # pyright: ignore[reportMissingImports]
import torch


def main(stage: int) -> None:
    deepspeed.init_distributed("gloo")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 5), torch.nn.Linear(5, 3, bias=False))
    settings = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in (1, 2):
        engine.backward(engine(torch.randn(2, 8).bfloat16()).float().pow(2).sum())
        engine.step()
        engine.save_checkpoint(str(Path(__file__).parent / f"stage{stage}"), tag=f"global_step{step}")


if __name__ == "__main__":
    main(int(sys.argv[1]))
