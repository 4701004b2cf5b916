"""Checks that figures can be drawn, before a command begins its work. They need matplotlib, of the extra ``plot``, which is
imported only when a figure is drawn."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from distmerge.errors import UserError


def require_matplotlib(what: str) -> None:
    """Refuse to draw figures without matplotlib.

    Args:
        what: the command or the flag that draws, for the error.

    Raises:
        UserError: if matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError(f"{what} needs matplotlib to draw figures: pip install 'distmerge[plot]'")


def check_picture(flag: str, path: str) -> None:
    """Refuse a figure that cannot be drawn because matplotlib is missing or the suffix of its file is unknown.

    Args:
        flag: the flag that gives the file, for the error.

    Raises:
        UserError: naming the flag.
    """
    require_matplotlib(flag)
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"{flag} must be a .svg, .png or .pdf file, got {path}")
