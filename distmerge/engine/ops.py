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

import torch

from distmerge.errors import UserError


def build_ops() -> bool:
    """Build and load what the offloaded optimizer needs, DeepSpeedCPUAdam's helper. Minutes at first, then a second.

    Returns:
        whether it was compiled now.

    Raises:
        UserError: where DeepSpeed is not installed.
    """
    import_deepspeed("cuda" if torch.cuda.is_available() else "cpu")
    from deepspeed.ops.op_builder import CPUAdamBuilder  # pyright: ignore[reportAttributeAccessIssue]
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(CPUAdamBuilder.NAME, verbose=False))
    with one_builder(folder):
        fresh = not (folder / f"{CPUAdamBuilder.NAME}.so").exists()
        CPUAdamBuilder().load(verbose=False)
    return fresh


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
    print("compiled DeepSpeed's helper" if build_ops() else "DeepSpeed's helper was compiled before", file=sys.stderr)


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
    # Ranks on CPUs would each compile and load its reductions through shared memory, which are for inference.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed
