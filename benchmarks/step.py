"""Tokens per second of the trainer, no merge being due, against a minimal loop with the same model, batch and optimizer.

The trainer's side is its real loop: configuration, data, engine, a merger that counts, meter and log. The other side is
what one would write by hand: token ids in one tensor, forward, backward, clip, AdamW. They run in turns in one process.

    python benchmarks/step.py [--small] [--out DIR] [--record]
"""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from report import Report, parser, spread
from torch import nn

from distmerge.config.toml import validate
from distmerge.config.train import TrainConfig
from distmerge.launch.ranks import Place
from distmerge.mesh import Mesh
from distmerge.model import build_model, load_tokenizer
from distmerge.rundir.layout import RunDirectory
from distmerge.trainer.loop import loop
from distmerge.trainer.run import Run
from distmerge.workers.diloco import DiLoCo

BATCH_SIZE = 8
LR = 1e-3
LIMIT = 0.97

MODELS = {
    "1.05M parameters": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "num_attention_heads": 4},
    "10.1M parameters": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 6},
}


def configuration(model: dict[str, int], run_dir: Path) -> TrainConfig:
    """One worker on one rank; neither evaluations nor checkpoints while it is timed, but the log's lines."""
    shape = {"model_type": "llama", "num_key_value_heads": model["num_attention_heads"], "tie_word_embeddings": True}
    never = sys.maxsize
    return validate(
        {
            "run_dir": str(run_dir),
            "steps": never,
            "model": {"config": shape | model},
            "train": {"batch_size": BATCH_SIZE, "gradient_clip": 1.0},
            "optimizer": {"lr": LR},
            "evaluate": {"every": never, "sequences": 8},
            "checkpoint": {"every": never},
        }
    )


def trainer(config: TrainConfig, mesh: Mesh) -> tuple[Callable[[int], None], Run]:
    """A function that runs the trainer's loop for that many more steps."""
    directory = RunDirectory(config.run_dir)
    directory.path.mkdir(parents=True)
    run = Run(config, mesh, directory)
    run.mergers.append(DiLoCo(run.engine.parameters, sys.maxsize, group=mesh.peers))
    run.resume()

    def steps(count: int) -> None:
        run.config = config.model_copy(update={"steps": run.step + count})
        loop(run)

    return steps, run


def by_hand(config: TrainConfig, run: Run) -> Callable[[int], None]:
    """A function that trains another copy of the model for that many steps."""
    device = run.mesh.device
    model = build_model(config.model, load_tokenizer("bytes"), config.seed).to(device).train()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.optimizer.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=config.optimizer.betas, fused=True)
    assert not isinstance(run.batches, tuple)
    ids = torch.cat([run.batches.batch(step).flatten(0, 1) for step in range(64)]).to(device)
    order = np.random.default_rng(0)

    def steps(count: int) -> None:
        for _ in range(count):
            batch = ids[torch.from_numpy(order.integers(0, len(ids), BATCH_SIZE)).to(device)]
            model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

    return steps


def seconds(steps: Callable[[int], None], count: int, device: torch.device) -> float:
    began = time.perf_counter()
    steps(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def compare(report: Report, mesh: Mesh, name: str, turns: int, count: int) -> None:
    run_dir = report.out / name.replace(" ", "-")
    shutil.rmtree(run_dir, ignore_errors=True)
    config = configuration(MODELS[name], run_dir)
    ours, run = trainer(config, mesh)
    theirs = by_hand(config, run)
    for side in (ours, theirs):
        side(5)  # the first steps allocate
    pairs = []
    for turn in range(turns):
        sides = [ours, theirs] if turn % 2 else [theirs, ours]
        taken = {side: seconds(side, count, mesh.device) for side in sides}
        pairs.append((taken[ours], taken[theirs]))
    tokens = count * BATCH_SIZE * config.data.sequence_length
    report.data[name] = {
        "tokens_per_second": spread([tokens / own for own, _ in pairs]),
        "tokens_per_second_by_hand": spread([tokens / hand for _, hand in pairs]),
        "ratio": spread([hand / own for own, hand in pairs]),
    }
    ratio = statistics.median(hand / own for own, hand in pairs)
    report.bar(f"tokens/s of the trainer against a minimal loop, {name}", ratio, ">=", LIMIT)


def main() -> None:
    options = parser(__doc__).parse_args()
    report = Report("step", options)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(free.getsockname()[1]))
    mesh = Mesh(configuration(MODELS["1.05M parameters"], report.out).mesh, Place(0, 1, 0, 1), threads=None)
    report.data |= {"device": str(mesh.device), "threads": torch.get_num_threads()}
    compare(report, mesh, "1.05M parameters", *((11, 10) if options.small else (31, 10)))
    if not options.small:
        compare(report, mesh, "10.1M parameters", 11, 4)
    mesh.close()
    report.finish()


if __name__ == "__main__":
    main()
