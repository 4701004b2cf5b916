"""Opens model directories: safetensors shards and their index, config.json, a tokenizer. Imports no torch.

Only the names and shapes of the tensors are read; no code knows their architecture.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distmerge.errors import UserError
from distmerge.files.header import Stored, read_header, shown
from distmerge.files.manifest import MANIFEST, read_manifest

INDEX = "model.safetensors.index.json"
RECORDS = ("block.json", MANIFEST)
"""Records that a run publishes beside a model: a block's, or the manifest of a published step or of the final model."""

JSON_LIMIT_BYTES = 64 << 20
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


@dataclass(frozen=True)
class Model:
    """A model on disk.

    Attributes:
        reference: what the user wrote; errors name the model by it.
        path: its directory, or its only file.
        tensors: every tensor in its files, by name, in file order.
        config: config.json; {} without one.
        factors: what a LoRA adapter changes in each tensor, by the tensor's name; {} without an adapter.
        recorded: size and hashes of its files, by the file's name, where the run that published it recorded them.
        adapter: the adapter's directory, where there is one; the record of its training lies there.
    """

    reference: str
    path: Path
    tensors: dict[str, Stored]
    config: dict[str, Any] = field(default_factory=dict)
    factors: dict[str, Any] = field(default_factory=dict)
    recorded: dict[str, Any] = field(default_factory=dict)
    adapter: Path | None = None

    @property
    def files(self) -> list[Path]:
        """The files that hold tensors, sorted."""
        own = {entry.file for entry in self.tensors.values()}
        return sorted(own | {entry.file for change in self.factors.values() for entry in change.stored})

    @property
    def directory(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def carried(self, names: tuple[str, ...]) -> dict[str, bytes]:
        """The content of those files among ``names`` that lie beside the weights."""
        return carried(self.directory, names)


def open_model(reference: str, allow_pickle: bool = False) -> Model:
    """Open the model that a directory, a .safetensors file or a hub id names.

    Args:
        allow_pickle: read PyTorch's pickled checkpoints as well.

    Raises:
        UserError: when there is none, or one of its headers or its index is malformed.
    """
    path = locate(reference)
    if path.is_file():
        return Model(reference, path, read_header(path).tensors)
    tensors = read_shards(path, allow_pickle)
    if not tensors:
        raise UserError(f"{reference} holds no tensors")
    config = read_json(path / "config.json") if (path / "config.json").exists() else {}
    return Model(reference, path, tensors, config, recorded=read_recorded(path))


def carried(directory: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The content of those files among ``names`` that lie in a model's directory, to be published with a merge of it.

    Raises:
        UserError: for a link that leads out of the directory: a model's author could aim it at a private file of the user's.
    """
    found = {name: directory / name for name in names if (directory / name).is_file()}
    for path in found.values():
        check_inside(directory, path)
    return {name: path.read_bytes() for name, path in found.items()}


def check_inside(directory: Path, path: Path) -> None:
    """Refuse a link that leads out of the model's directory. The hub's cache is an exception: its snapshots link to blobs."""
    root = directory.resolve()
    roots = [root, *(parent.parent / "blobs" for parent in root.parents if parent.name == "snapshots")]
    real = path.resolve()
    if not any(real.is_relative_to(place) for place in roots):
        raise UserError(
            f"{path} is a link out of the model's directory, to {real}, and is not copied; put the file itself there"
        )


def read_recorded(path: Path) -> dict[str, dict[str, Any]]:
    """Sizes and hashes of a model's files, by name, from the record that a run published with them; {} without a record.

    Raises:
        UserError: when the record is damaged.
    """
    name = next((name for name in RECORDS if (path / name).exists()), None)
    if name is None:
        return {}
    try:
        return read_manifest(path, name)["files"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path / name} cannot be read ({error}); remove it to merge the model without its hashes") from None


def recorded_files(models: Iterable[Model]) -> dict[Path, dict[str, Any]]:
    """Recorded sizes and hashes of the files of several models, by path."""
    return {file: model.recorded[file.name] for model in models for file in model.files if file.name in model.recorded}


def locate(reference: str) -> Path:
    """The local directory or file of a model. Hub ids (``org/name`` or ``org/name@revision``) are downloaded to its cache.

    Raises:
        UserError: when it does not exist here or the hub does not have it.
    """
    path = Path(reference).expanduser()
    if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
        return path
    if path.is_file():
        raise UserError(f"a model must be a directory, a .safetensors file or a hub id, got the file {reference}")
    if not HUB_ID.fullmatch(reference):
        raise UserError(f"the model {shown(reference)} does not exist")
    return locate_on_hub(reference)


def locate_on_hub(reference: str) -> Path:
    from huggingface_hub import snapshot_download

    name, _, revision = reference.partition("@")
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        found = snapshot_download(name, revision=revision or None, allow_patterns=wanted)
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{reference} is not a directory here, and cannot be downloaded from the hub: {reason}") from None
    return Path(found)


def read_shards(path: Path, allow_pickle: bool) -> dict[str, Stored]:
    """All tensors of a directory, which has one safetensors file, several with an index, or pickles where they are allowed."""
    if (path / INDEX).exists():
        return read_index(path)
    found = sorted(file for file in path.glob("*.safetensors") if file.name != "adapter_model.safetensors")
    if len(found) == 1:
        return read_header(found[0]).tensors
    if found:
        raise UserError(f"{path} holds {len(found)} safetensors files, but no {INDEX} that says which are the model's")
    pickles = sorted([*path.glob("pytorch_model*.bin"), *path.glob("*.pt"), *path.glob("*.pth")])
    if pickles and not allow_pickle:
        raise UserError(
            f"{path} holds pickles ({pickles[0].name}), which can run code when read; allow them with --allow-pickle"
        )
    if pickles:
        from distmerge.files.pickles import as_stored

        return as_stored(pickles)
    raise UserError(f"{path} holds no safetensors file")


def read_index(path: Path) -> dict[str, Stored]:
    """Every tensor that the index lists, from the shard that it names. The index and the shards must agree exactly."""
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{path / INDEX} must have a weight_map of names to files")
    headers: dict[str, dict[str, Stored]] = {}
    for shard in dict.fromkeys(weight_map.values() if all(isinstance(v, str) for v in weight_map.values()) else [None]):
        if shard is None or Path(shard).name != shard or shard in (".", "..") or not shard.endswith(".safetensors"):
            raise UserError(f"{path / INDEX}: a shard must be a .safetensors file of the same directory, got {shown(shard)}")
        if not (path / shard).is_file():
            raise UserError(f"{path / INDEX} names the shard {shown(shard)}, which is missing")
        headers[shard] = read_header(path / shard).tensors
    held = {name: shard for shard, tensors in headers.items() for name in tensors}
    if sum(len(tensors) for tensors in headers.values()) != len(held):
        raise UserError(f"{path}: two shards hold a tensor of the same name")
    for name in held.keys() | weight_map.keys():
        if held.get(name) != weight_map.get(name):
            listed, found = weight_map.get(name, "no shard"), held.get(name, "no shard")
            raise UserError(f"{path / INDEX} says that {shown(name)} is in {listed}, but it is in {found}")
    return {name: entry for shard in sorted(headers) for name, entry in headers[shard].items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of at most ``JSON_LIMIT_BYTES``.

    Raises:
        UserError: when the file is not one, is larger, or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would block
            raise UserError(f"{path} must be a regular file")
        if status.st_size > JSON_LIMIT_BYTES:
            raise UserError(f"{path} must have <= {JSON_LIMIT_BYTES} bytes, got {status.st_size}")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    try:
        table = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON") from None
    if not isinstance(table, dict):
        raise UserError(f"{path} must be a JSON object")
    return table
