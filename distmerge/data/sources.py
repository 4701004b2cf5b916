"""Finds a run's text, tokenizer and model on this machine, and reports what is missing before anything heavy is loaded."""

from __future__ import annotations

import glob
import sysconfig
from pathlib import Path

from distmerge.config.train import Data, TrainConfig
from distmerge.errors import UserError

LOADERS = {
    ".txt": "text",
    ".py": "text",
    ".md": "text",
    ".rst": "text",
    ".c": "text",
    ".h": "text",
    ".jsonl": "json",
    ".parquet": "parquet",
}

MAGIC = {
    b"\x1f\x8b": "compressed with gzip",
    b"\xfd7zXZ\0": "compressed with xz",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "Parquet",
    b"\xff\xfe\0\0": "in UTF-32",
    b"\xff\xfe": "in UTF-16",
    b"\xfe\xff": "in UTF-16",
}
"""The first bytes of files that are not text."""

SAMPLE_BYTES, UNDECODED_SHARE = 1 << 16, 0.01
"""How many bytes of a text file are checked, and the share of its characters that may be undecodable."""


def check_sources(config: TrainConfig) -> None:
    """Check that a configuration's files and directories exist, before any rank is launched.

    Raises:
        UserError: naming the key whose file or directory is missing or not text.
    """
    if config.data.source != "hub":
        data_files(config.data)
    for name, section in config.stopping.skills.items():
        if section.source == "files":
            files_of(f"config.stopping.skills.{name}.files", section.files)
    if config.data.replay is not None:
        files_of("config.data.replay.files", config.data.replay.files)
    if config.data.tokenizer != "bytes":
        check_directory("config.data.tokenizer", config.data.tokenizer)
    if config.model.path is not None:
        check_directory("config.model.path", config.model.path)


def check_directory(key: str, name: str) -> None:
    """Refuse a name that is neither a local directory nor a model on the hub or in its cache.

    transformers looks for a misspelt path on the hub, and without a network retries for more than a minute. Here the hub is
    asked only once.
    """
    if Path(name).is_dir():
        return
    from huggingface_hub import HfApi, constants, file_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    refused = f"{key} must be a directory or a hub id, got {name}, which"
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"{refused} " + ("is a file" if Path(name).is_file() else "does not exist")) from None
    if Path(constants.HF_HUB_CACHE, file_download.repo_folder_name(repo_id=name, repo_type="model")).is_dir():
        return
    try:
        HfApi().model_info(name, timeout=10)
    except GatedRepoError:
        return  # transformers explains what to do
    except RepositoryNotFoundError:
        raise UserError(f"{refused} does not exist here, nor on the hub, or you have no access to it there") from None
    except HfHubHTTPError:
        return  # the hub answers, but with an error that may pass: transformers retries
    except Exception as error:  # huggingface_hub does not document which errors its HTTP client raises
        reason = " ".join(str(error).split())
        raise UserError(f"{refused} does not exist here, and the hub cannot be reached: {reason}") from None


def data_files(section: Data) -> tuple[str, list[str]]:
    """The name of the loader in ``datasets``, and the sorted files."""
    if section.source == "stdlib":
        return "text", stdlib_files()
    return files_of("config.data.files", section.files)


def files_of(key: str, patterns: list[str]) -> tuple[str, list[str]]:
    """The name of the loader in ``datasets``, and the sorted files that match globs.

    Args:
        key: how an error names the globs.

    Raises:
        UserError: when a pattern matches nothing, the files need different loaders, or one is not UTF-8 text.
    """
    files: list[str] = []
    for pattern in patterns:
        # A file's name with brackets is also a pattern, but one that does not match the file itself.
        found = [pattern] if Path(pattern).is_file() else glob.glob(pattern, recursive=True)
        matches = sorted(path for path in found if Path(path).is_file())
        if not matches:
            raise UserError(f'{key}: "{pattern}" matches no file')
        files += [path for path in matches if path not in files]
    loaders = {LOADERS.get(Path(path).suffix) for path in files}
    if None in loaders or len(loaders) > 1:
        kinds = sorted({Path(path).suffix or "no suffix" for path in files})
        texts = ", ".join(suffix for suffix, loader in LOADERS.items() if loader == "text")
        raise UserError(f"{key} must be all text ({texts}), all .jsonl or all .parquet, got {', '.join(kinds)}")
    if loaders != {"parquet"}:
        for path in files:
            check_text(key, path)
    return loaders.pop() or "", files


def check_text(key: str, path: str) -> None:
    """Refuse a file whose first bytes are not UTF-8 text: it would be read with replacement characters for what cannot be
    decoded, and trained on."""
    try:
        with open(path, "rb") as file:
            start = file.read(SAMPLE_BYTES)
    except OSError as error:
        raise UserError(f"{key}: cannot read {path}: {error.strerror}") from None
    kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
    if kind is None and b"\0" in start:
        kind = "binary, or in UTF-16"
    # Single bytes that are not UTF-8 are common in large texts, and allowed.
    decoded = start.decode("utf-8", "replace")
    if kind is None and decoded.count("\N{REPLACEMENT CHARACTER}") > max(1, UNDECODED_SHARE * len(decoded)):
        kind = "not in UTF-8"
    if kind is not None:
        raise UserError(f"{key} must be text in UTF-8, got {path}, which is {kind}")


def stdlib_files() -> list[str]:
    """The source files of Python's standard library, without its tests: real text on every machine that runs Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [str(path) for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    if not files:
        raise UserError(f'config.data.source must be "files" or "hub" where Python has no library sources, as in {root}')
    return sorted(files)
