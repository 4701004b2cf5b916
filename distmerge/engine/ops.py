"""What DeepSpeed compiles on this machine, built once and in one process.

DeepSpeed compiles a helper when it is first used, under a lock file that a killed process leaves behind: whoever needs the
helper next waits for ever. Here one process builds at a time, under a lock that the kernel frees, and a lock file that
nobody is building under is removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distmerge.errors import UserError

EVERY_RUN = ("deepspeed_shm_comm",)
"""Compiled by deepspeed.init_distributed in a user's own loop on CPUs; the trainer goes without."""

OFFLOAD = ("cpu_adam",)
"""Compiled where the optimizer is offloaded."""


def build_ops(names: tuple[str, ...] = EVERY_RUN + OFFLOAD) -> list[str]:
    """Build and load DeepSpeed's helpers for the CPU; those that were compiled now. Minutes at first, then a second.

    Raises:
        UserError: where DeepSpeed is not installed.
    """
    import_deepspeed("cpu")
    from deepspeed.ops.op_builder.cpu import CPUAdamBuilder, ShareMemCommBuilder
    from torch.utils.cpp_extension import _get_build_directory

    builders = {builder.NAME: builder for builder in (ShareMemCommBuilder, CPUAdamBuilder)}
    built: list[str] = []
    for name in names:
        folder = Path(_get_build_directory(name, verbose=False))
        with one_builder(folder):
            fresh = not (folder / f"{name}.so").exists()
            builders[name]().load(verbose=False)
        built += [name] * fresh
    return built


@contextmanager
def one_builder(folder: Path) -> Iterator[None]:
    """A stretch in which nobody else builds in ``folder``, and no leftover lock file lies in it."""
    with open(folder.with_name(f".{folder.name}.distmerge"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        leftover = folder / "lock"
        while leftover.exists() and working_in(folder):
            time.sleep(0.2)  # a compiler that outlived its parent, or a program that does not know of our lock
        leftover.unlink(missing_ok=True)
        yield


def working_in(folder: Path) -> bool:
    """Whether a process works in a folder: ninja and the compilers it starts do."""
    import psutil  # comes with DeepSpeed

    own = os.getpid()
    return any(process.pid != own and process.info["cwd"] == str(folder) for process in psutil.process_iter(["cwd"]))


def main() -> None:
    """``distmerge build-ops``."""
    built = build_ops()
    print(f"built {', '.join(built)}" if built else "everything that DeepSpeed compiles here is built", file=sys.stderr)


def import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, for this device, silent but for errors.

    Raises:
        UserError: where it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        import deepspeed
    except ImportError:
        raise UserError('config.engine.kind "deepspeed" needs DeepSpeed: pip install distmerge[deepspeed]') from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Its reductions through shared memory are for inference; compiling them here would take minutes.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed
