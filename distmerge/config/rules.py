"""What a [[merge]] entry says of its rule, held against the catalogue of rules. Imports no torch.

A rule's own parameters stand in the entry beside its other keys, such as ``density`` beside ``rule = "ties"``.
"""

from __future__ import annotations

import difflib
from typing import Any

from distmerge.errors import UserError
from distmerge.rules import catalogue
from distmerge.rules.parameters import PARAMETERS, REQUIRED, checked

AUTO = "auto"
"""The rule that is chosen at each merge by how much the workers' deltas agree."""

Value = float | bool | str
"""Of a rule's parameter."""


def known_rule(name: str, stored: bool, key: str = "rule") -> str | None:
    """The one name of a rule; None for a rule from outside that is not loaded, in a configuration that a run directory keeps.

    Args:
        key: that names it, for the error.

    Raises:
        UserError: when there is no such rule.
    """
    if stored and not is_loaded(name):
        return None
    try:
        catalogue.entry(name, key)
    except UserError as error:
        near = difflib.get_close_matches(name, [*catalogue.names(), AUTO], n=1)
        raise UserError(f'{error}; did you mean "{near[0]}"?' if near else str(error)) from None
    return catalogue.canonical(name)


def is_loaded(name: str) -> bool:
    """Whether the rule is known; one from outside may not be, in a configuration that a run directory keeps."""
    return catalogue.canonical(name) in catalogue.ENTRIES


def is_weighted_mean(rule: str) -> bool:
    """Whether the rule is the workers' mean under some weights; that is what ``auto`` takes where the deltas agree."""
    entry = catalogue.entry(rule)
    return entry.linear and entry.normalize and entry.base == "none"


def own_parameters(rule: str) -> list[str]:
    """The parameters that an entry may set of a rule. Weights are the workers' own."""
    return [name for name in catalogue.entry(rule).parameters if name != "weight"]


def check_parameters(rule: str, given: dict[str, Any], keys: list[str]) -> dict[str, Value]:
    """The parameters that an entry gives, as numbers and booleans.

    Args:
        given: all keys of the entry that are no fields of its section.
        keys: the section's fields, one of which was perhaps meant.

    Raises:
        UserError: for one that the rule does not have, for a value that is not allowed, or where one is missing.
    """
    takes = own_parameters(rule)
    for name, value in given.items():
        if name in takes:
            continue
        if name in PARAMETERS:
            raise UserError(
                f'{name} must not be given for rule "{rule}", which takes {", ".join(takes) or "none"}, got {value!r}'
            )
        near = difflib.get_close_matches(name, [*takes, *keys], n=1, cutoff=0.4)
        meant = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(sorted([*keys, *takes]))}"
        raise UserError(f"{name} is not a known key; {meant}")
    for name in takes:
        if name not in given and catalogue.entry(rule).default(name) is REQUIRED:
            raise UserError(f'{name} must be given for rule "{rule}"')
    return {name: checked(name, as_boolean(name, value), f'rule "{rule}"') for name, value in given.items()}


def as_boolean(name: str, value: Any) -> Any:
    """A value of the command line, where everything is text."""
    return value == "true" if PARAMETERS[name].holds is None and value in ("true", "false") else value


def check_workers(rule: str, workers: int, key: str = "rule") -> None:
    """Refuse a rule that cannot merge so many workers' deltas.

    Raises:
        UserError: naming the capability that is missing.
    """
    entry = catalogue.entry(rule, key)
    if entry.first == "general":
        raise UserError(f"{key} = {rule!r} needs a general model as its first member, and workers' deltas have none")
    least = max(entry.least, 1)
    if not least <= workers <= (entry.most or workers):
        count = f"at least {least}" if entry.most is None else f"exactly {entry.most}"
        raise UserError(f"{key} = {rule!r} takes {count} member{'s' if least > 1 else ''}, but there are {workers} workers")
