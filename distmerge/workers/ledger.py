"""The ledger: how many bytes a merger's collectives moved, by the costs of the standard algorithms."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass
class Ledger:
    """Counts since the start of the run, over one group of ``peers`` ranks.

    Attributes:
        collectives: collectives issued.
        payload_bytes: bytes of the merged values, in the wire's format.
    """

    peers: int
    collectives: int = 0
    payload_bytes: int = 0
    reduced_bytes: int = 0
    gathered_bytes: int = 0
    exchanged_bytes: int = 0

    def __post_init__(self) -> None:
        self._taken = (0, 0.0)

    def all_reduce(self, size_bytes: int) -> None:
        """An all-reduce of b bytes over M ranks sends 2 b (M - 1) / M from each rank."""
        self.collectives += 1
        self.payload_bytes += size_bytes
        self.reduced_bytes += size_bytes

    def gather(self, size_bytes: int, payload: bool = True) -> None:
        """A reduce-scatter, all-gather or all-to-all of b bytes in total sends b (M - 1) / M from each rank.

        The second half of an exchange carries no new ``payload``.
        """
        self.collectives += 1
        self.payload_bytes += size_bytes if payload else 0
        self.gathered_bytes += size_bytes

    def exchange(self, sent_bytes: int, payload_bytes: int = 0) -> None:
        """One half of an exchange, of which ``sent_bytes`` left this rank. The second half carries no new payload."""
        self.collectives += 1
        self.payload_bytes += payload_bytes
        self.exchanged_bytes += sent_bytes

    @property
    def bytes_sent(self) -> float:
        """Bytes that this rank has sent."""
        return (2 * self.reduced_bytes + self.gathered_bytes) * (self.peers - 1) / self.peers + self.exchanged_bytes

    def take(self) -> tuple[int, float]:
        """Collectives, and bytes that this rank sent, since the previous call."""
        (collectives, sent), self._taken = self._taken, (self.collectives, self.bytes_sent)
        return self.collectives - collectives, self.bytes_sent - sent

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state["peers"] == self.peers, "a ledger belongs to a number of peers"
        for name, value in state.items():
            setattr(self, name, value)
        self.take()
