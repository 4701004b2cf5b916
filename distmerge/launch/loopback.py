"""A rendezvous for torch's agent when all ranks run on this machine. Its store listens on the loopback interface only."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import ClassVar

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND = "distmerge-loopback"
HOST = "127.0.0.1"


class Loopback(RendezvousHandler):
    """The rendezvous of a single agent, whose ranks use the agent's store."""

    newest: ClassVar[Loopback | None] = None

    def __init__(self, parameters: RendezvousParameters):
        listening = socket.create_server((HOST, 0), backlog=1024)
        self.run_id, self.closed = parameters.run_id, False
        self.port: int = listening.getsockname()[1]
        self.store = TCPStore(
            HOST, self.port, None, True, timedelta(seconds=60), wait_for_workers=False, master_listen_fd=listening.detach()
        )
        Loopback.newest = self

    @classmethod
    def has_key(cls, key: str) -> bool:
        """Whether a rank of the newest job has set ``key`` on its notice board."""
        return cls.newest is not None and cls.newest.store.check([f"/attempt-0/{key}"])

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        return RendezvousInfo(self.store, 0, 1, RendezvousStoreInfo(HOST, self.port))

    def is_closed(self) -> bool:
        return self.closed

    def set_closed(self) -> None:
        self.closed = True

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        self.closed = True
        return True


rendezvous_handler_registry.register(BACKEND, Loopback)
