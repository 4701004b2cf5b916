"""The outer optimizer: how what the members share moves along their merged delta."""

from __future__ import annotations

from torch import Tensor


def outer_step(
    anchor: Tensor, delta: Tensor, velocity: Tensor | None, lr: float, momentum: float = 0.0, nesterov: bool = True
) -> None:
    """Move ``anchor`` and ``velocity`` in place along the merged ``delta``.

    The pseudo-gradient is ``g = -delta``; its sign is handled here and nowhere else. With ``buf = momentum * buf + g``,
    Nesterov's form is ``anchor -= lr * (g + momentum * buf)`` and the plain one is ``anchor -= lr * buf``. Here ``velocity``
    is ``-buf``, which turns each minus into a plus. ``lr = 1`` without momentum adds the delta, which is parameter averaging
    if the delta is a mean.

    Args:
        anchor: ``[n]`` float32, updated.
        delta: ``[n]``, left as it is.
        velocity: ``[n]`` float32, updated; None exactly when ``momentum`` is 0.

    Source: DiLoCo, https://arxiv.org/abs/2311.08105; torch.optim.SGD has the same form.
    """
    assert (velocity is None) == (momentum == 0), "a velocity belongs to a momentum"
    if velocity is None:
        anchor.add_(delta, alpha=lr)
        return
    velocity.mul_(momentum).add_(delta)
    if nesterov:
        anchor.add_(delta, alpha=lr).add_(velocity, alpha=lr * momentum)
    else:
        anchor.add_(velocity, alpha=lr)
