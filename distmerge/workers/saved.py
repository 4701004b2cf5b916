"""The check of a saved merger state before it is loaded: a checkpoint of another version is refused in one line."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from distmerge.errors import UserError

ADVICE = "resume with the version of distmerge that wrote it, or from a checkpoint written while no merge was in flight"


def check_keys(state: dict[str, Any], keys: Collection[str], what: str) -> None:
    """Refuse a part of a saved state in which this version does not find all that it reads.

    Args:
        keys: what this version reads of it.
        what: the part's name in the error.

    Raises:
        UserError: naming the keys that the state lacks.
    """
    if missing := sorted(set(keys) - set(state)):
        raise incompatible(what, f"it lacks {', '.join(missing)}")


def incompatible(what: str, reason: str) -> UserError:
    """The error for a part of a saved state that another version of distmerge wrote."""
    return UserError(f"the checkpoint was written by an incompatible version: in {what} {reason}; {ADVICE}")
