"""Real text for skills on every machine that has Python: what the standard library brings, apart by kind.

They are chosen so that they differ in what a model must learn: ``prose`` (docstrings and the topics of pydoc: English),
``code`` (the library's source without its docstrings and comments: Python's grammar and names), ``headers`` (C declarations and
macros; where they are installed), ``arithmetic`` (the decimal test vectors of the library's tests: operands and results in
columns; where they are installed).
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
"""A kind of text that this machine has less of is left out."""

PIECE_LINES = 40
"""Text is divided between training and test in pieces of so many lines."""

PARTS = {"pretraining": 0.2, "train": 0.7, "test": 0.1}


@functools.cache
def parsed(path: str) -> tuple[str, str]:
    """The docstrings of a Python file, and its code without them and without comments."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in the library's own strings
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
    """Those of the kinds that this machine has enough of."""
    found = {name: KINDS[name]() for name in names}
    return {name: text for name, text in found.items() if len(text) >= LEAST_CHARACTERS}


def of_files(key: str, patterns: list[str]) -> str:
    """The text of files, given as globs; ``key`` names them in an error."""
    loader, files = files_of(key, patterns)
    if loader != "text":
        raise UserError(f"{key} must be text files, got {', '.join(files[:3])}")
    return joined(map(Path, files))


def write_parts(text: str, folder: Path, name: str, limit: int) -> dict[str, str]:
    """``NAME-pretraining.txt``, ``NAME-train.txt`` and ``NAME-test.txt``: no line in two of them.

    Args:
        limit: characters to take at most, spread over the text.

    Returns:
        the paths by part.

    Raises:
        UserError: where files of other text are there: models were trained on them.
    """
    paths = {part: folder / f"{name}-{part}.txt" for part in PARTS}
    for part, content in cut(text, limit).items():
        if not paths[part].exists():
            write_atomically(paths[part], content)
        elif paths[part].read_bytes() != content.encode():
            raise UserError(
                f"{paths[part]} holds other text than {name} has now, and models were trained on it: take another out"
            )
    return {part: str(path) for part, path in paths.items()}


def cut(text: str, limit: int) -> dict[str, str]:
    """The parts' contents."""
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
