"""The result of a merge. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from distmerge.merging.record import Hashes

if TYPE_CHECKING:
    from distmerge.merging.diagnosis import Diagnosis


@dataclass(frozen=True)
class MergeResult:
    """A model that was merged and published.

    Attributes:
        out: its directory.
        method: by which it was merged; for "auto" the method that was chosen.
        kind: whether it is a whole model or a LoRA adapter.
        tensors: how many tensors the model has; for an adapter, how many weights it changes.
        bytes: the total size of the files with tensors.
        seconds: how long merging and writing took.
        outputs: size and hashes of each file with tensors, by its name.
        inputs: size and hashes of each file that was read, by its path.
        report: the diagnosis of the inputs, if the options asked for it.
        notes: lines about what was decided, such as the method that "auto" chose and why.
    """

    out: Path
    method: str
    kind: Literal["model", "adapter"]
    tensors: int
    bytes: int
    seconds: float
    outputs: Hashes
    inputs: Hashes
    report: Diagnosis | None = None
    notes: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "out": str(self.out),
            "method": self.method,
            "kind": self.kind,
            "tensors": self.tensors,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "outputs": self.outputs,
            "inputs": self.inputs,
            "report": self.report.as_dict() if self.report else None,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        said = f"an adapter of {self.tensors} weights by {self.method}"
        if self.kind == "model":
            said = f"{self.tensors} tensors, {self.bytes / 1e6:.1f} MB in {self.seconds:.1f} s by {self.method}"
        return "\n".join([*self.notes, f"{self.out}: {said}"])
