"""Where a run's text, tokenizer and model come from on this machine: found, or refused, before anything heavy is loaded."""

from __future__ import annotations

import glob
import sysconfig
from pathlib import Path

from distmerge.config import Data, TrainConfig
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


def check_sources(config: TrainConfig) -> None:
    """Refuse a configuration whose files or directories are not there, before any rank is launched."""
    if config.data.source != "hub":
        data_files(config.data)
    for name, section in config.stopping.skills.items():
        if section.source == "files":
            files_of(f"config.stopping.skills.{name}.files", section.files)
    if config.data.replay is not None:
        files_of("config.data.replay.files", config.data.replay.files)
    check_directory("config.data.tokenizer", config.data.tokenizer)
    if config.model.path is not None:
        check_directory("config.model.path", config.model.path)


def check_directory(key: str, name: str) -> None:
    """Refuse what can only be a directory and is none; anything else may be a hub id."""
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"{key} must be a directory or a hub id, got {name}, which does not exist")


def data_files(section: Data) -> tuple[str, list[str]]:
    """The name of ``datasets``' loader and the sorted files."""
    if section.source == "stdlib":
        return "text", stdlib_files()
    return files_of("config.data.files", section.files)


def files_of(key: str, patterns: list[str]) -> tuple[str, list[str]]:
    """What ``data_files`` gives, of globs; ``key`` names them in an error."""
    files: list[str] = []
    for pattern in patterns:
        matches = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
        if not matches:
            raise UserError(f'{key}: "{pattern}" matches no file')
        files += [path for path in matches if path not in files]
    loaders = {LOADERS.get(Path(path).suffix) for path in files}
    if None in loaders or len(loaders) > 1:
        kinds = sorted({Path(path).suffix or "no suffix" for path in files})
        texts = ", ".join(suffix for suffix, loader in LOADERS.items() if loader == "text")
        raise UserError(f"{key} must be all text ({texts}), all .jsonl or all .parquet, got {', '.join(kinds)}")
    return loaders.pop() or "", files


def stdlib_files() -> list[str]:
    """The standard library's own source text, without its tests: real text on every machine that runs Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    files = [str(path) for path in root.rglob("*.py") if not left_out & set(path.relative_to(root).parts)]
    if not files:
        raise UserError(f'config.data.source must be "files" or "hub" where Python has no library sources, as in {root}')
    return sorted(files)
