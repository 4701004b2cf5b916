"""What draws: matplotlib, from the extra ``plot``. It is asked for before a verb begins its work, and loaded when it draws."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from distmerge.errors import UserError


def require_matplotlib(what: str) -> None:
    """Refuse to begin what would end in a picture that cannot be drawn.

    Args:
        what: the verb or the flag that draws, for the error.

    Raises:
        UserError: without matplotlib.
    """
    if find_spec("matplotlib") is None:
        raise UserError(f"{what} needs matplotlib, which draws its pictures: pip install 'distmerge[plot]'")


def check_picture(flag: str, path: str) -> None:
    """Refuse a picture that could not be drawn, or whose suffix names no format.

    Raises:
        UserError: naming the flag.
    """
    require_matplotlib(flag)
    if Path(path).suffix not in (".svg", ".png", ".pdf"):
        raise UserError(f"{flag} must be a .svg, .png or .pdf file, got {path}")
