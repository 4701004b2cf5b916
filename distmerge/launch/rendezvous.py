"""Rendezvous: the ranks connect to the store at MASTER_ADDR:MASTER_PORT and wait there until all have connected.

If all ranks run on one machine, sockets listen on its loopback interface only. A wrong environment variable, a port that is in
use and a rank that does not connect are reported as a :class:`~distmerge.errors.UserError` of one line.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from distmerge.errors import UserError
from distmerge.launch.interrupts import SIGNAL_THREAD
from distmerge.launch.ranks import Place, environment_integer


def open_store(place: Place, seconds: float) -> Store:
    """Connect to the store of this rank's job and wait until all ranks have connected.

    Args:
        seconds: time limit for all ranks to connect.

    Raises:
        UserError: naming the variable, the port or the missing ranks.
    """
    if place.world == 1:
        return PrefixStore(name_of(place), HashStore())
    host, port = os.environ.get("MASTER_ADDR", ""), environment_integer("MASTER_PORT", 1, 65535)
    if not host or any(letter.isspace() or not letter.isprintable() for letter in host):
        raise UserError(f"MASTER_ADDR must be the host of rank 0, got {host!r}")
    timeout, began = timedelta(seconds=seconds), time.monotonic()
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = place.rank == 0 and not agents
    try:
        listening = listener(host, port) if hosts and is_loopback(host) else None
        descriptor = None if listening is None else listening.detach()
        with SIGNAL_THREAD.stderr_discarded():  # torch's sockets log every attempt at length
            store = TCPStore(host, port, None, hosts, timeout, wait_for_workers=False, master_listen_fd=descriptor)
    except OSError as error:
        raise UserError(f"MASTER_PORT {port} of {host} cannot be listened on: {error.strerror or error}") from None
    except RuntimeError as error:
        raise UserError(unreachable(host, port, hosts, seconds, error)) from None
    store.set_timeout(timeout)
    ours = PrefixStore(name_of(place), store)
    remaining = seconds - (time.monotonic() - began)
    wait_for_ranks(ours, place, remaining, f"{host}:{port} within mesh.timeout_seconds = {seconds:g}")
    return ours


def unreachable(host: str, port: int, hosts: bool, seconds: float, error: RuntimeError) -> str:
    text = " ".join(str(error).split())
    if hosts and "EADDRINUSE" in text:
        return f"MASTER_PORT {port} of {host} cannot be listened on: Address already in use"
    if hosts:
        return f"rank 0 cannot be reached at MASTER_ADDR {host}, MASTER_PORT {port}: {text[:200]}"
    late = f"rank 0 did not start within mesh.timeout_seconds = {seconds:g}"
    return f"no answer from MASTER_ADDR {host}, MASTER_PORT {port}: {late}"


def wait_for_ranks(store: Store, place: Place, seconds: float, where: str) -> None:
    """Wait until all ranks have connected.

    Args:
        where: the store's address and the time limit, for the error.

    Raises:
        UserError: naming the ranks that have not connected within ``seconds``.
    """
    keys = [f"here/{rank}" for rank in range(place.world)]
    try:
        store.set(keys[place.rank], "1")
        with SIGNAL_THREAD.stderr_discarded():
            store.wait(keys, timedelta(seconds=max(0.1, seconds)))
    except RuntimeError:
        try:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
        except RuntimeError:
            missing = "0"
        raise UserError(f"rank {missing} of {place.world} did not connect to {where}") from None


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens on this address only."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except OSError:
        listening.close()
        raise
    return listening


def is_loopback(host: str) -> bool:
    """Whether the name or address is that of the loopback interface."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def on_one_machine(place: Place) -> bool:
    """Whether all ranks are known to run on this machine."""
    all_local = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")
    return place.world == 1 or all_local or is_loopback(os.environ.get("MASTER_ADDR", ""))


def keep_to_loopback() -> None:
    """Let gloo and NCCL use the loopback interface, unless the environment names another."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", names[0])


def name_of(place: Place) -> str:
    """A prefix for the store's keys that is unique to this attempt at the job, since torchrun's agent may give a restarted job
    the store of the failed one.

    With several nodes the agents' counts of restarts may differ, so the prefix has no count there. Instead, launch/torchrun.sh
    makes torchrun create a new store for each attempt.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"{place.name}/attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}" if shared else f"{place.name}/attempt"
