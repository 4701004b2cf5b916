"""Builds the C++ extension that DeepSpeed's offloaded optimizer needs.

DeepSpeed compiles the extension at its first use, guarded by a lock file. A killed process leaves that file behind, and then
every later process waits for it forever. Here one process builds at a time under an ``flock``, which the kernel releases when
the process ends, and a lock file that no running build owns is removed.
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
    """Build and load DeepSpeedCPUAdam's extension. The first build takes minutes; later calls only load it.

    Returns:
        whether the extension was compiled by this call.

    Raises:
        UserError: if DeepSpeed is not installed.
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
    """A context in which no other process builds in ``folder``. A lock file left in it is removed first."""
    with open(folder.with_name(f".{folder.name}.distmerge"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        leftover = folder / "lock"
        while leftover.exists() and working_in(folder):
            time.sleep(0.2)  # a compiler has outlived its parent, or another program builds without our lock
        leftover.unlink(missing_ok=True)
        yield


def working_in(folder: Path) -> bool:
    """Whether another process has ``folder`` as its working directory, as ninja and the compilers that it starts have."""
    import psutil  # comes with DeepSpeed

    own = os.getpid()
    return any(process.pid != own and process.info["cwd"] == str(folder) for process in psutil.process_iter(["cwd"]))


def main() -> None:
    """``distmerge build-ops``."""
    compiled = build_ops()
    print(f"DeepSpeed's CPU Adam extension {'is compiled' if compiled else 'was already compiled'}", file=sys.stderr)


def import_deepspeed(device_type: str) -> Any:
    """Import DeepSpeed for this type of device, with its logging reduced to errors.

    Raises:
        UserError: if it is not installed.
    """
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        import deepspeed
    except ImportError:
        raise UserError('config.engine.kind "deepspeed" needs DeepSpeed: pip install distmerge[deepspeed]') from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Otherwise each rank on a CPU would compile and load DeepSpeed's shared-memory reductions, which only inference needs.
    deepspeed.ops.__dict__.setdefault("__compatible_ops__", {})
    return deepspeed
