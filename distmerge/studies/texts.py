"""Real text for skills on every machine that has Python, from the standard library, separated by kind.

The kinds differ in what a model must learn: ``prose`` is English (docstrings and the topics of pydoc), ``code`` is Python's
grammar and names (the library's source without docstrings and comments), ``headers`` are C declarations and macros,
``arithmetic`` has operands and results in columns (the library's test vectors for decimal numbers). The last two are not
installed everywhere.
"""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

from distmerge.data.sources import files_of, stdlib_files
from distmerge.errors import UserError
from distmerge.rundir.layout import write_atomically

LEAST_CHARACTERS = 200_000
"""Kinds of which this machine has less text are left out."""

PIECE_LINES = 40
"""Text is divided between training and test in pieces of this many lines."""

PARTS = {"pretraining": 0.2, "train": 0.7, "test": 0.1}
"""The parts of each text, and their shares of it."""


@functools.cache
def parsed(path: str) -> tuple[str, str]:
    """The docstrings of a Python file, and its code without them and without comments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about invalid escapes in the library's strings
            tree = ast.parse(Path(path).read_text(encoding="utf-8", errors="replace"))
    except (SyntaxError, ValueError):
        return "", ""
    said: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text is not None:
                said.append(text + "\n\n")
                node.body = node.body[1:] or [ast.Pass()]
    return "".join(said), ast.unparse(tree) + "\n\n"


def prose() -> str:
    from pydoc_data.topics import topics

    return "".join(docstrings for docstrings, _ in map(parsed, stdlib_files())) + "\n\n".join(topics.values())


def code() -> str:
    return "".join(source for _, source in map(parsed, stdlib_files()) if len(source) < 200_000)


def headers() -> str:
    return joined(sorted(Path(sysconfig.get_paths()["include"]).rglob("*.h")))


def arithmetic() -> str:
    return joined(sorted((Path(sysconfig.get_paths()["stdlib"]) / "test" / "decimaltestdata").glob("*.decTest")))


def joined(paths: Iterable[Path]) -> str:
    return "".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


KINDS: dict[str, Callable[[], str]] = {"prose": prose, "code": code, "headers": headers, "arithmetic": arithmetic}


def kinds_here(names: Iterable[str]) -> dict[str, str]:
    """The texts of those kinds among ``names`` that this machine has enough of."""
    found = {name: KINDS[name]() for name in names}
    return {name: text for name, text in found.items() if len(text) >= LEAST_CHARACTERS}


def of_files(key: str, patterns: list[str]) -> str:
    """The text of the files that match globs. ``key`` names them in an error."""
    loader, files = files_of(key, patterns)
    if loader != "text":
        raise UserError(f"{key} must be text files, got {', '.join(files[:3])}")
    return joined(map(Path, files))


def write_parts(text: str, folder: Path, name: str, limit: int) -> dict[str, str]:
    """Divide a text into ``NAME-pretraining.txt``, ``NAME-train.txt`` and ``NAME-test.txt``, without overlap.

    Args:
        limit: the largest number of characters to take, spread over the text.

    Returns:
        the paths by part.

    Raises:
        UserError: when such files with other content exist: models were trained on them.
    """
    paths = {part: folder / f"{name}-{part}.txt" for part in PARTS}
    for part, content in cut(text, limit).items():
        if not paths[part].exists():
            write_atomically(paths[part], content)
        elif paths[part].read_bytes() != content.encode():
            raise UserError(
                f"{paths[part]} holds another text than {name} has now, and models were trained on it; take another out"
            )
    return {part: str(path) for part, path in paths.items()}


def cut(text: str, limit: int) -> dict[str, str]:
    """The contents of the parts: shuffled pieces of the text, up to ``limit`` characters."""
    lines = text.splitlines(keepends=True)
    pieces = ["".join(lines[at : at + PIECE_LINES]) for at in range(0, len(lines), PIECE_LINES)]
    random.Random(0).shuffle(pieces)
    kept, size = [], 0
    for piece in pieces:
        if size >= limit:
            break
        kept.append(piece)
        size += len(piece)
    found, at, share = {}, 0, 0.0
    for part in PARTS:
        share += PARTS[part]
        stop = max(at + 1, round(share * len(kept)))
        found[part] = "".join(kept[at:stop])
        at = stop
    return found
