"""The skills that benchmarks/overtraining.py trains experts on: text of four kinds, and rotated digits with wrong labels.

A task gives a model, its base, batches, and scores on validation and test examples that no training sees.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distmerge.config.experts import Lora
from distmerge.experts.adapt import Theta, with_lora
from distmerge.experts.examples import token_scores
from distmerge.studies.texts import KINDS
from distmerge.theta.flat import FlatParameters

LENGTH = 128
BATCH = 8
RANK = Lora(rank=8, alpha=16.0)


class Split(NamedTuple):
    """``inputs`` and ``labels`` of examples; for text both are the token ids ``[N, LENGTH]``."""

    inputs: Tensor
    labels: Tensor


class Skill(NamedTuple):
    """``wrong``: the training examples whose labels are wrong on purpose ``[N]``; none for text."""

    train: Split
    validation: Split
    test: Split
    wrong: Tensor | None = None


class Task(NamedTuple):
    """Attributes: the skills by name; the base, which is never trained in place; logits and labels of a split as
    ``[N, T, C]`` and ``[N, T]``; sequences a step; the rate of full finetuning and of LoRA, None where there is none."""

    skills: dict[str, Skill]
    base: nn.Module
    predict: Callable[[nn.Module, Split], tuple[Tensor, Tensor]]
    batch: int
    rate: float
    lora_rate: float | None

    def loss(self, model: nn.Module, split: Split) -> Tensor:
        logits, labels = self.predict(model, split)
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())

    @torch.no_grad()
    def score(self, theta: Theta, vector: Tensor, split: Split) -> float:
        """The mean loss of ``vector`` on a split; lower is better."""
        theta.write(vector)
        theta.model.eval()
        return float(self.loss(theta.model, split))

    @torch.no_grad()
    def hits(self, theta: Theta, vector: Tensor, split: Split) -> tuple[Tensor, Tensor, Tensor]:
        """``[N, T]`` each: loss, EL2N and right, of every target."""
        theta.write(vector)
        theta.model.eval()
        return token_scores(*self.predict(theta.model, split))

    def plain(self) -> Theta:
        """A copy of the base into which vectors are put."""
        model = copy.deepcopy(self.base)
        return Theta(model, FlatParameters(model))


class Trainee:
    """One expert in training: full, or LoRA; its batches are a function of the seed and the step."""

    def __init__(self, task: Task, skill: Skill, kind: str, seed: int):
        self.task, self.skill, self.seed = task, skill, seed
        model = copy.deepcopy(task.base)
        rate = task.rate
        if kind == "lora":
            assert task.lora_rate is not None
            model, rate = with_lora(model, RANK, seed), task.lora_rate
        self.model, self.rate = model, rate
        self.theta = Theta(model, FlatParameters(model))
        trained = [value for value in model.parameters() if value.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate, betas=(0.9, 0.95), weight_decay=0.01)

    def step(self, step: int, factor: float = 1.0) -> None:
        """Inner step ``step``, counted from 0: warmup over 8 steps, then constant."""
        train = self.skill.train
        epoch, at = divmod(step * self.task.batch, len(train.inputs) // self.task.batch * self.task.batch)
        order = np.random.Generator(np.random.Philox(key=[self.seed, epoch])).permutation(len(train.inputs))
        rows = torch.from_numpy(order[at : at + self.task.batch])
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor * min(1.0, (step + 1) / 8)
        self.model.train()
        self.task.loss(self.model, Split(train.inputs[rows], train.labels[rows])).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def whole(split: Split) -> Skill:
    """A skill that is only trained on."""
    return Skill(split, split, split)


# ---- text


def text_task(width: int, seed: int, base_steps: int, folder: Path) -> Task:
    """Four kinds of the standard library's text; the base has seen a little of each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    ids = text_ids(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=LENGTH, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    parts = {name: text_skill(rows) for name, rows in ids.items()}
    pretraining = torch.cat([pretrain for _, pretrain in parts.values()])
    task = Task({name: skill for name, (skill, _) in parts.items()}, model, next_tokens, BATCH, 2e-3, 5e-3)
    base = Trainee(task._replace(rate=4e-3), whole(Split(pretraining, pretraining)), "full", seed)
    for step in range(base_steps):
        base.step(step, min(1.0, 2 * (1 - step / base_steps)))
    return task._replace(base=base.model)


def text_ids(folder: Path) -> dict[str, Tensor]:
    """``[1632, LENGTH]`` bytes of each kind, in an order of its own; kept in ``folder``."""
    path = folder / "texts.pt"
    if not path.exists():
        found = {}
        for name, read in KINDS.items():
            text = np.frombuffer(read().encode(), dtype=np.uint8)
            rows = text[: len(text) // LENGTH * LENGTH].reshape(-1, LENGTH)
            order = np.random.Generator(np.random.Philox(0)).permutation(len(rows))[:1632]
            found[name] = torch.from_numpy(rows[np.sort(order)][np.argsort(np.argsort(order))].astype(np.int64))
        torch.save(found, path)
    return torch.load(path, weights_only=True)


def text_skill(rows: Tensor) -> tuple[Skill, Tensor]:
    """512 rows to train on, 32 to validate, 64 to test; and 1024 that the base trains on."""
    train, validation, test, pretraining = rows[:512], rows[512:544], rows[544:608], rows[608:1632]
    return Skill(Split(train, train), Split(validation, validation), Split(test, test)), pretraining


def next_tokens(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    return model(input_ids=split.inputs, use_cache=False).logits[:, :-1], split.labels[:, 1:]


# ---- digits


def digits_task(seed: int, base_steps: int, noise: float = 0.15) -> Task:
    """scikit-learn's digits turned by 0, 90, 180 and 270 degrees, a skill each, with wrong labels in training; a small ViT
    that has seen a little of each."""
    from sklearn.datasets import load_digits
    from transformers import ViTConfig, ViTForImageClassification

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16 - 0.3
    target: Any = torch.from_numpy(labels)
    order = torch.from_numpy(np.random.Generator(np.random.Philox(0)).permutation(len(pixels)))
    pixels, target = pixels[order], target[order]
    torch.manual_seed(seed)
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=2,
        num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 10
    task = Task(turned(pixels, target, noise), ViTForImageClassification(config), classes, 32, 3e-3, None)
    pretraining = Split(torch.cat([torch.rot90(pixels[1400:], turn, (2, 3)) for turn in range(4)]), target[1400:].repeat(4))
    base = Trainee(task, whole(pretraining), "full", seed)
    for step in range(base_steps):
        base.step(step)
    return task._replace(base=base.model)


def turned(pixels: Tensor, target: Tensor, noise: float) -> dict[str, Skill]:
    """A skill for each turn: 700 images to train on, 100 to validate, 300 to test. The noise is the same for all seeds."""
    skills = {}
    for turn in range(4):
        seen = torch.rot90(pixels, turn, (2, 3))
        generator = torch.Generator().manual_seed(turn)
        given = target[:700].clone()
        wrong = torch.rand(700, generator=generator) < noise
        given[wrong] = (given[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
        skills[f"turn {90 * turn}"] = Skill(
            Split(seen[:700], given), Split(seen[700:800], target[700:800]), Split(seen[800:1100], target[800:1100]), wrong
        )
    return skills


def classes(model: nn.Module, split: Split) -> tuple[Tensor, Tensor]:
    return model(pixel_values=split.inputs).logits.unsqueeze(1), split.labels.unsqueeze(1)
