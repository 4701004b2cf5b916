"""Checks the rule of a [[merge]] entry and its parameters against the catalogue of rules. Imports no torch.

A rule's parameters are keys of the entry like all others, such as ``density`` with ``rule = "ties"``.
"""

from __future__ import annotations

import difflib
from typing import Any

from distmerge.errors import UserError
from distmerge.rules import catalogue
from distmerge.rules.parameters import PARAMETERS, REQUIRED, checked

AUTO = "auto"
"""The name in place of a rule's for choosing one at each merge, by the correlation of the workers' deltas."""

Value = float | bool | str
"""The value of a rule's parameter."""


def known_rule(name: str, stored: bool, key: str = "rule") -> str | None:
    """The canonical name of a rule.

    Args:
        stored: whether the configuration is that of a run directory, for which plugins are not loaded.
        key: the key that names the rule, for the error.

    Returns:
        the name, or None if ``stored`` and the rule may be a plugin's that is not loaded.

    Raises:
        UserError: if there is no such rule.
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
    """Whether the rule is in the catalogue. A plugin's may not be, see ``stored`` of :func:`known_rule`."""
    return catalogue.canonical(name) in catalogue.ENTRIES


def is_weighted_mean(rule: str) -> bool:
    """Whether the rule is a weighted mean of the workers' deltas, which ``auto`` uses if the deltas correlate."""
    entry = catalogue.entry(rule)
    return entry.linear and entry.normalize and entry.base == "none"


def own_parameters(rule: str) -> list[str]:
    """The parameters of a rule that an entry may set. ``weight`` is not among them: the workers' weights are used."""
    return [name for name in catalogue.entry(rule).parameters if name != "weight"]


def check_parameters(rule: str, given: dict[str, Any], keys: list[str]) -> dict[str, Value]:
    """Check and convert the parameters of a rule that an entry gives.

    Args:
        given: the keys of the entry that are not fields of its section.
        keys: the section's fields, for suggestions if a key is misspelled.

    Raises:
        UserError: for a parameter that the rule does not have, a value that is not allowed, or a missing parameter.
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
    """Convert "true" and "false" for a boolean parameter, since values of the command line are strings."""
    return value == "true" if PARAMETERS[name].holds is None and value in ("true", "false") else value


def check_workers(rule: str, workers: int, key: str = "rule") -> None:
    """Refuse a rule that cannot merge the deltas of ``workers`` workers.

    Raises:
        UserError: naming the number that the rule takes.
    """
    entry = catalogue.entry(rule, key)
    if entry.first == "general":
        raise UserError(f"{key} = {rule!r} needs a general model as its first member, and workers' deltas have none")
    least = max(entry.least, 1)
    if not least <= workers <= (entry.most or workers):
        count = f"at least {least}" if entry.most is None else f"exactly {entry.most}"
        raise UserError(f"{key} = {rule!r} takes {count} member{'s' if least > 1 else ''}, but there are {workers} workers")
