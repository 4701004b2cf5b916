"""Leaving in time: SIGTERM or SIGUSR1, as a scheduler sends before it takes a machine away, and all ranks leave at one step.

Workers are at different steps when a signal comes, and only meet where they merge, evaluate or commit. The first rank that
is told writes its step into the rendezvous store; all leave at the first such meeting after it, which all know by the same
arithmetic. Nothing is sent for this unless somebody was told.
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from typing import Any

from distmerge.mesh import Mesh

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
KEY = "leave"


class Preemption:
    """Whether this job has to leave, asked once per step.

    Args:
        lead: steps that a worker can be ahead of a merge that another has not begun: the mergers' overlap or delay.
    """

    def __init__(self, mesh: Mesh, lead: int):
        self.mesh, self.lead = mesh, lead
        self.told = self.published = False
        self.meetings: deque[int] = deque(maxlen=1024)
        self.before: dict[signal.Signals, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._tell) for number in SIGNALS}

    def _tell(self, number: int, frame: Any) -> None:
        self.told = True

    def due(self, step: int, meeting: bool) -> bool:
        """Whether to leave after ``step``: the same on all ranks.

        Args:
            meeting: whether the step had a collective of all ranks.
        """
        if self.mesh.world == 1:
            return self.told
        if self.told and not self.published:
            self.mesh.store.compare_set(KEY, "", str(step))
            self.published = True
        if not meeting:
            return False
        self.meetings.append(step)
        if not self.mesh.store.check([KEY]):
            return False
        told_at = int(self.mesh.store.get(KEY))
        first = next((met for met in self.meetings if met > told_at), None)
        return first is not None and step >= first + self.lead

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
