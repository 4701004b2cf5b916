"""Simulated losses and gradient norms for the detector's benchmark: healthy families, faults of known start, divergences.

Fixed before the detector was tuned, together with ``JUDGING``; tuning looked at ``TUNING`` alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

JUDGING, TUNING = 9_000_000, 1_000
"""First seeds."""

STEPS = 2500

FAULT_AT = 600
"""The step, counted from 0, at which a fault or a divergence begins."""

Random = np.random.Generator


class Trace(NamedTuple):
    """Loss and gradient norm of each step, [steps] each."""

    loss: np.ndarray
    norm: np.ndarray


def curve(steps: int, start: float = 5.5, end: float = 2.0, time: float = 150.0) -> np.ndarray:
    """A loss that falls as in training."""
    return end + (start - end) * np.exp(-np.arange(steps) / time)


def norms(random: Random, steps: int) -> np.ndarray:
    return np.exp(random.normal(-1, 0.25, steps))


def trace(random: Random, level: np.ndarray, noise: np.ndarray) -> Trace:
    return Trace(np.maximum(level * (1 + noise), 1e-6), norms(random, len(level)))


def correlated(random: Random, steps: int, scale: float, memory: float = 0.9) -> np.ndarray:
    """AR(1) noise; ``scale`` is that of its innovations."""
    noise, last = np.empty(steps), 0.0
    for step, innovation in enumerate(random.normal(0, scale, steps)):
        last = noise[step] = memory * last + innovation
    return noise


def chosen(random: Random, steps: int, share: float) -> np.ndarray:
    return random.random(steps) < share


# ---- healthy runs


def steady(random: Random) -> Trace:
    return trace(random, curve(STEPS), random.normal(0, random.uniform(0.003, 0.05), STEPS))


def rare_domain(random: Random) -> Trace:
    """10% of batches from another domain."""
    level = curve(STEPS) * np.where(chosen(random, STEPS, 0.1), random.uniform(1.2, 2.5), 1)
    return trace(random, level, random.normal(0, 0.02, STEPS))


def doubled(random: Random) -> Trace:
    """2% of batches at twice the loss."""
    return trace(random, curve(STEPS) * np.where(chosen(random, STEPS, 0.02), 2, 1), random.normal(0, 0.02, STEPS))


def near_zero(random: Random) -> Trace:
    """A run that knows its data by heart: a loss of some thousandths, whose scatter is as large as itself."""
    level = curve(STEPS, end=random.choice([0.001, 0.01, 0.05]), time=100) * np.exp(random.normal(0, 0.5, STEPS))
    return trace(random, level * np.where(chosen(random, STEPS, 0.01), 10, 1), np.zeros(STEPS))


def bursts(random: Random) -> Trace:
    """Gradient norms of 10 to 1,000 times for 1 to 20 steps, with a calm loss."""
    made = trace(random, curve(STEPS), random.normal(0, 0.02, STEPS))
    for start in np.flatnonzero(chosen(random, STEPS, 1 / 150)):
        made.norm[start : start + random.integers(1, 21)] *= 10 ** random.uniform(1, 3)
    return made


def sawtooth(random: Random) -> Trace:
    """Epochs: at the begin of each the loss falls by 5 to 25%, and it rises until the next."""
    length, height = int(random.choice([50, 120, 300, 700])), random.uniform(0.05, 0.25)
    return trace(random, curve(STEPS) * (1 + height * (np.arange(STEPS) % length) / length), random.normal(0, 0.02, STEPS))


def heavy_tails(random: Random) -> Trace:
    """Student's t with 2 degrees of freedom, whose variance is infinite."""
    return trace(random, curve(STEPS), np.maximum(0.02 * random.standard_t(2, STEPS), -0.5))


def autoregressive(random: Random) -> Trace:
    return trace(random, curve(STEPS), correlated(random, STEPS, 0.02))


def switch(random: Random) -> Trace:
    """Another domain from one step on: its loss is 1.2 to 1.9 times as high, and falls as the run learns it."""
    at, height = int(random.integers(200, 1800)), random.uniform(0.2, 0.9)
    past = np.arange(STEPS) - at
    level = curve(STEPS) * (1 + (past >= 0) * height * (0.4 + 0.6 * np.exp(-np.maximum(past, 0) / random.uniform(20, 400))))
    return trace(random, level, random.normal(0, 0.02, STEPS))


def gradual_switch(random: Random) -> Trace:
    """The same, mixed in over 30 to 500 steps, as by a shuffle buffer."""
    past = np.arange(STEPS) - int(random.integers(300, 1800))
    level = curve(STEPS) * (1 + random.uniform(0.1, 0.45) * np.clip(past / random.uniform(30, 500), 0, 1))
    return trace(random, level, random.normal(0, 0.02, STEPS))


def batch_of_one(random: Random) -> Trace:
    """Documents of some steps, whose difficulties differ by a third."""
    document = np.repeat(random.lognormal(0, 0.3, STEPS), random.integers(1, 9, STEPS))[:STEPS]
    made = trace(random, curve(STEPS) * document, random.normal(0, 0.15, STEPS))
    return Trace(made.loss, made.norm * np.exp(random.normal(0, 0.5, STEPS)))


def constant_batches(random: Random) -> Trace:
    """30 batches of one and the same token, whose loss falls to nothing, then the good data again."""
    made = trace(random, curve(STEPS), random.normal(0, 0.02, STEPS))
    for at in (700, 1500):
        made.loss[at : at + 30] = made.loss[at - 1] * np.exp(-np.arange(30) / 3) + 0.001
    return made


def finetuning(random: Random) -> Trace:
    """A trained model that hardly improves, and data that is up to 40% harder from some step on."""
    past = np.arange(STEPS) - 1200
    return trace(
        random, curve(STEPS, 2.1, 1.9, 500) * (1 + (past > 0) * random.uniform(0.1, 0.4)), random.normal(0, 0.04, STEPS)
    )


def spikes(random: Random) -> Trace:
    """Spikes that heal by themselves: 1.2 to 2.2 times the loss, gone after 3 to 30 steps."""
    level = curve(STEPS)
    for at in np.flatnonzero(chosen(random, STEPS, 1 / 300)):
        level[at:] *= 1 + random.uniform(0.2, 1.2) * np.exp(-np.arange(STEPS - at) / random.uniform(2, 10))
    return trace(random, level, random.normal(0, 0.02, STEPS))


HEALTHY: dict[str, Callable[[Random], Trace]] = {
    made.__name__: made
    for made in (
        steady, rare_domain, doubled, near_zero, bursts, sawtooth, heavy_tails, autoregressive, switch, gradual_switch,
        batch_of_one, constant_batches, finetuning, spikes,
    )
}  # fmt: skip


# ---- faults, to be suspected soon: factors on the loss after the fault's start, at 2% noise


def faulty(random: Random, factors: np.ndarray) -> Trace:
    """``FAULT_AT`` healthy steps at a level of 2, then ``factors`` on the loss."""
    level = np.concatenate([np.full(FAULT_AT, 2.0), 2.0 * factors])
    return trace(random, level, random.normal(0, 0.02, len(level)))


AFTER = np.arange(200)

FAULTS: dict[str, tuple[np.ndarray, int]] = {
    "a step of 10%": (np.full(200, 1.1), 3),
    "a step of 50%": (np.full(200, 1.5), 1),
    "a spike of 50% that decays": (1 + 0.5 * np.exp(-AFTER / 5), 2),
    "a spike of 25% that decays": (1 + 0.25 * np.exp(-AFTER / 5), 2),
    "a ramp of 0.3% a step": (1 + 0.003 * (AFTER + 1), 60),
    "30 constant batches": (np.where(AFTER < 30, 0.02 + 0.98 * np.exp(-AFTER / 3), 1.0), 5),
}
"""Factors, and the most steps until the fault is suspected (1 is the fault's first step)."""


# ---- divergences, to be called so


def doubling(random: Random, level: float) -> np.ndarray:
    """Grows by 1 to 8% a step, to 2 to 4 times the start's loss."""
    return np.minimum(level * (1 + random.uniform(0.01, 0.08)) ** AFTER_LONG, 5.5 * random.uniform(2, 4))


def linear(random: Random, level: float) -> np.ndarray:
    """Grows by 0.5 to 3% of its level a step, and does not stop."""
    return level * (1 + random.uniform(0.005, 0.03) * AFTER_LONG)


def untrained(random: Random, level: float) -> np.ndarray:
    """Jumps to the loss of the start, or up to half above it, and stays."""
    return np.full(len(AFTER_LONG), 5.5 * random.uniform(1, 1.5))


def collapse(random: Random, level: float) -> np.ndarray:
    """Climbs to about the start's loss within 3 to 40 steps and stays there."""
    return level + (5.5 * random.uniform(1, 1.2) - level) * np.minimum(1, (AFTER_LONG + 1) / random.integers(3, 41))


def explosion(random: Random, level: float) -> np.ndarray:
    """Leaps to 2 to 50 times the start's loss and comes down slowly."""
    return 5.5 * (1 + random.uniform(1, 49) * np.exp(-AFTER_LONG / 200))


AFTER_LONG = np.arange(800)

DIVERGENCES: dict[str, Callable[[Random, float], np.ndarray]] = {
    made.__name__: made for made in (doubling, linear, untrained, collapse, explosion)
}

BACKGROUNDS: dict[str, Callable[[Random], Trace]] = {
    made.__name__: made for made in (steady, rare_domain, heavy_tails, autoregressive, batch_of_one)
}


def diverging(random: Random, background: str, divergence: str) -> Trace:
    """A healthy family's scatter on the level of a divergence from ``FAULT_AT`` on."""
    healthy = BACKGROUNDS[background](random)
    level = curve(STEPS)
    scatter = healthy.loss / level
    after = DIVERGENCES[divergence](random, float(level[FAULT_AT]))
    loss = np.concatenate([healthy.loss[:FAULT_AT], after * scatter[FAULT_AT : FAULT_AT + len(after)]])
    return Trace(loss, healthy.norm[: len(loss)])
