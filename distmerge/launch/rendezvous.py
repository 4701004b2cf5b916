"""How ranks find each other: the store at MASTER_ADDR:MASTER_PORT, and the roll call of those that came to it.

The sockets of a job that runs on one machine listen on its loopback interface alone. What is wrong with the environment, a
port that is taken and a rank that never comes are users' errors, told in a line.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from datetime import timedelta

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # pyright: ignore[reportPrivateImportUsage]

from distmerge.errors import UserError
from distmerge.launch.interrupts import EARS
from distmerge.launch.ranks import Place, number_of


def open_store(place: Place, seconds: float) -> Store:
    """The store of this rank's job; all ranks come to it within so many seconds.

    Raises:
        UserError: naming the variable, the port or the ranks that are missing.
    """
    if place.world == 1:
        return PrefixStore(name_of(place), HashStore())
    host, port = os.environ.get("MASTER_ADDR", ""), number_of("MASTER_PORT", 1, 65535)
    if not host or any(letter.isspace() or not letter.isprintable() for letter in host):
        raise UserError(f"MASTER_ADDR must be the host of rank 0, got {host!r}")
    timeout, began = timedelta(seconds=seconds), time.monotonic()
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    hosts = place.rank == 0 and not agents
    try:
        listening = listener(host, port) if hosts and is_loopback(host) else None
        descriptor = None if listening is None else listening.detach()
        with EARS.without_stderr():  # torch's sockets write pages about each try
            store = TCPStore(host, port, None, hosts, timeout, wait_for_workers=False, master_listen_fd=descriptor)
    except OSError as error:
        raise UserError(f"MASTER_PORT {port} of {host} cannot be listened on: {error.strerror or error}") from None
    except RuntimeError as error:
        raise UserError(unreachable(host, port, hosts, seconds, error)) from None
    store.set_timeout(timeout)
    ours = PrefixStore(name_of(place), store)
    call_the_roll(ours, place, seconds - (time.monotonic() - began), f"{host}:{port} within mesh.timeout_seconds = {seconds:g}")
    return ours


def unreachable(host: str, port: int, hosts: bool, seconds: float, error: RuntimeError) -> str:
    text = " ".join(str(error).split())
    if hosts and "EADDRINUSE" in text:
        return f"MASTER_PORT {port} of {host} cannot be listened on: Address already in use"
    if hosts:
        return f"rank 0 cannot be reached at MASTER_ADDR {host}, MASTER_PORT {port}: {text[:200]}"
    late = f"rank 0 did not come within mesh.timeout_seconds = {seconds:g}"
    return f"nobody answers at MASTER_ADDR {host}, MASTER_PORT {port}: {late}"


def call_the_roll(store: Store, place: Place, seconds: float, where: str) -> None:
    """Wait until all ranks are here; name those that are not."""
    keys = [f"here/{rank}" for rank in range(place.world)]
    try:
        store.set(keys[place.rank], "1")
        with EARS.without_stderr():
            store.wait(keys, timedelta(seconds=max(0.1, seconds)))
    except RuntimeError:
        try:
            missing = ", ".join(str(rank) for rank, key in enumerate(keys) if not store.check([key]))
        except RuntimeError:
            missing = "0"
        raise UserError(f"rank {missing} of {place.world} did not come to {where}") from None


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens on that address and no other."""
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
    """Whether only this machine can mean itself by the name or address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def on_one_machine(place: Place) -> bool:
    """Whether all ranks are known to run here."""
    told = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE", "1")
    return place.world == 1 or told or is_loopback(os.environ.get("MASTER_ADDR", ""))


def keep_to_loopback() -> None:
    """Let the collectives' sockets listen on the loopback interface, where nothing else is asked for."""
    names = [name for _, name in socket.if_nameindex() if name in ("lo", "lo0")]
    if names:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names[0])
        os.environ.setdefault("NCCL_SOCKET_IFNAME", names[0])


def name_of(place: Place) -> str:
    """A name of this attempt at the job: torchrun's agent may give a restarted job the store of the one that failed.

    Agents of several nodes count restarts apart; there, launch/torchrun.sh has a store made for each attempt.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"{place.name}/attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}" if shared else f"{place.name}/attempt"
