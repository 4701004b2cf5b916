"""Converts other trainers' checkpoints, DCP and DeepSpeed ZeRO directories, to safetensors in a directory beside them.

Both formats contain pickles, which can run code when they are read, so that the user must allow them with a flag.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distmerge.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".converted"


def is_foreign(path: Path) -> bool:
    return is_dcp(path) or is_zero(path)


def is_dcp(path: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote it: that writes .metadata and *.distcp."""
    return (path / ".metadata").is_file()


def is_zero(path: Path) -> bool:
    """Whether it is a DeepSpeed run's directory, which has the file ``latest``, or one of its tags, with *_optim_states.pt."""
    return (path / "latest").is_file() or any(path.glob("*_optim_states.pt"))


def newest_tag(path: Path) -> str | None:
    """The tag of the newest checkpoint in a DeepSpeed run's directory; None for other directories."""
    latest = path / "latest"
    return latest.read_text().strip() if latest.is_file() else None


def as_safetensors(path: Path, allow_pickle: bool) -> Path:
    """Convert a checkpoint into ``PATH.converted`` and return that directory. It is kept and used again unless the checkpoint
    has changed since.

    Raises:
        UserError: when pickles are not allowed, or the checkpoint cannot be read.
    """
    converted = path.with_name(path.name + SUFFIX)
    if converted.is_dir() and converted.stat().st_mtime_ns >= max(file.stat().st_mtime_ns for file in path.rglob("*")):
        return converted
    if not allow_pickle:
        raise UserError(
            f"{path} is a DCP or DeepSpeed checkpoint, whose pickles can run code when read; allow it with --allow-pickle"
        )
    from distmerge.files.directories import publish_directory, write_file

    tensors = read_dcp(path) if is_dcp(path) else read_zero(path)

    def write(directory: Path) -> None:
        write_file(directory / "model.safetensors", tensors)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            if (path / name).is_file():
                shutil.copyfile(path / name, directory / name)

    publish_directory(converted, {}, write)
    return converted


def read_dcp(path: Path) -> dict[str, Tensor]:
    """The model's tensors in a DCP directory: those under ``model.`` where there are any, else all."""
    from torch import Tensor
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

    state: dict[str, Any] = {}
    try:
        _load_state_dict(state, FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    except CheckpointException as error:  # a BaseException that gathers the errors of the ranks
        causes = [cause for cause, _ in error.failures.values()]
        raise UserError(f"cannot read the DCP checkpoint {path}: {first_line(causes[0])}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"cannot read the DCP checkpoint {path}: {first_line(error)}") from None
    model = state.get("model", state)
    tensors = {name: tensor.contiguous() for name, tensor in flattened(model) if isinstance(tensor, Tensor)}
    if not tensors:
        raise UserError(f"the DCP checkpoint {path} holds no tensors")
    return tensors


def flattened(state: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for name, value in state.items():
        leaves += flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else [(f"{prefix}{name}", value)]
    return leaves


def read_zero(path: Path) -> dict[str, Tensor]:
    """DeepSpeed's float32 master weights, put together from the ranks' shards by DeepSpeed's own code."""
    tagged = (path / "latest").is_file()
    root, tag = (str(path), None) if tagged else (str(path.parent), path.name)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress and the accelerator that it uses
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            state = get_fp32_state_dict_from_zero_checkpoint(root, tag)
    except ImportError:
        raise UserError("reading a DeepSpeed checkpoint needs deepspeed: pip install distmerge[deepspeed]") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"cannot read the DeepSpeed checkpoint {path}: {first_line(error)}") from None
    if not state:
        raise UserError(f"the DeepSpeed checkpoint {path} holds no tensors")
    return {name: tensor.contiguous() for name, tensor in state.items()}


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[0]
