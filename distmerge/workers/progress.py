"""A worker's progress: its inner steps and tokens, in total and since each fragment was sent."""

from __future__ import annotations

from typing import Any

from torch import Tensor


class Progress:
    """Counts since the start of the run.

    Attributes:
        steps, tokens: how many this worker has trained on.
        sent: each fragment's steps and tokens when it was last sent.
        equal_at: the step at which all workers last had the same parameters.
    """

    def __init__(self, fragments: int):
        self.steps = 0
        self.tokens: float | Tensor = 0.0
        self.sent: list[tuple[int, float]] = [(0, 0.0)] * fragments
        self.equal_at = 0

    def count(self, tokens: float | Tensor) -> None:
        """Count one inner step on ``tokens`` tokens. A scalar on the device stays there: reading it would wait for the step."""
        self.steps += 1
        self.tokens += tokens

    def since_sent(self, number: int) -> int:
        """Inner steps since a fragment was last sent."""
        return self.steps - self.sent[number][0]

    def send(self, number: int) -> tuple[int, float]:
        """Steps and tokens since a fragment was last sent, and note that it is sent now."""
        steps, tokens = self.sent[number]
        self.tokens = float(self.tokens)
        self.sent[number] = (self.steps, self.tokens)
        return self.steps - steps, self.tokens - tokens

    def note_merge(self, mix: float, closing: bool, last: bool) -> None:
        """Remember this step if all workers have the same parameters after a merge; ``last`` says whether it was of the last
        fragment."""
        if last and (closing or (mix == 0 and len(self.sent) == 1)):
            self.equal_at = self.steps

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "tokens": float(self.tokens), "sent": self.sent, "equal_at": self.equal_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.tokens, self.equal_at = state["steps"], state["tokens"], state["equal_at"]
        self.sent = [(steps, tokens) for steps, tokens in state["sent"]]
