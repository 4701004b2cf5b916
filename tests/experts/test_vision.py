"""The library's way, with any module: a small ViT on real images, experts of disjoint digits, merged in memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distmerge.experts.adapt import Theta
from distmerge.experts.examples import Scores, nothing_known, observe, scores_of, token_scores
from distmerge.merging.in_memory import compare, merge
from distmerge.theta.flat import FlatParameters


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's handwritten digits, ``[1797, 1, 8, 8]``."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16 - 0.3, torch.from_numpy(labels)


def small_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4,
        num_channels=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    config.num_labels = 10
    return ViTForImageClassification(config)


def test_experts_of_disjoint_digits() -> None:
    pixels, labels = digits()
    model = small_vit()
    theta = Theta(model, FlatParameters(model))
    base = theta.read()
    parts = {"low": labels < 5, "high": labels >= 5}
    experts = {name: trained(theta, base, pixels[part], labels[part]) for name, part in parts.items()}
    assert theta.numel == sum(value.numel() for value in model.parameters())

    def loss(vector: Tensor, part: Tensor) -> float:
        with theta.holding(vector), torch.no_grad():
            return float(nn.functional.cross_entropy(model(pixel_values=pixels[part]).logits, labels[part]))

    theta.write(base)
    for name, part in parts.items():
        assert loss(experts[name], part) < loss(base, part) - 0.5
    merged = merge("mean", base, list(experts.values()))
    torch.testing.assert_close(merged, (experts["low"] + experts["high"]) / 2)
    assert torch.equal(theta.read(), base)  # what a merge is judged in is left as it was
    found = compare(base, list(experts.values()), list(experts), lambda v: sum(loss(v, part) for part in parts.values()), 0)
    assert found["scores"]["mean"] == sum(loss(merged, part) for part in parts.values())
    assert found["best_of_all"] == min(found["scores"], key=found["scores"].__getitem__)

    with torch.no_grad(), theta.holding(experts["low"]):
        logits = model(pixel_values=pixels[:50]).logits.unsqueeze(1)
    scores: Scores = scores_of(*token_scores(logits, labels[:50, None]), torch.ones(50, 1, dtype=torch.bool))
    assert torch.equal(scores.right.bool(), logits[:, 0].argmax(-1) == labels[:50])
    from distmerge.config.experts import Examples

    known = observe(nothing_known(50), scores, 32, Examples(track=True))
    assert torch.equal(known.learned, scores.right.bool())


def trained(theta: Theta, base: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
    """An expert: 60 steps from the base."""
    theta.write(base)
    optimizer = torch.optim.AdamW(theta.model.parameters(), lr=1e-2)
    for step in range(60):
        rows = torch.randint(0, len(labels), (32,), generator=torch.Generator().manual_seed(step))
        nn.functional.cross_entropy(theta.model(pixel_values=pixels[rows]).logits, labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return theta.read()
