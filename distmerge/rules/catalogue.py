"""The catalogue of rules: the one place where names become rules. Imports no torch until a rule is built.

Hyphens and underscores are the same in names, and a name may have aliases (mergekit's ``linear`` is the ``mean``).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from distmerge.errors import UserError
from distmerge.rules import plugins
from distmerge.rules.entry import Entry
from distmerge.rules.parameters import FORMS, PARAMETERS, REQUIRED, VARIANTS, checked

if TYPE_CHECKING:
    from distmerge.rules.protocol import Rule, Target

BUILDERS = "distmerge.rules.builders:"
TASK = ("weight", "lambda", "normalize", "int8_mask")
THINNED = (*TASK, "density", "rescale")
MERGEKIT = "https://github.com/arcee-ai/mergekit"
SOUPS = "https://arxiv.org/abs/2203.05482"
DECOUPLED = "https://arxiv.org/abs/2604.21428"
ROBUST = "https://arxiv.org/abs/1803.01498"
TIES = "https://arxiv.org/abs/2306.01708"
DARE = "https://arxiv.org/abs/2311.03099"
DELLA = "https://arxiv.org/abs/2406.11617"
BREADCRUMBS = "https://arxiv.org/abs/2312.06795"

ENTRIES: dict[str, Entry] = {
    "mean": Entry(
        SOUPS, BUILDERS + "mean", ("weight", "normalize"), base="none", linear=True, elementwise=True, normalize=True
    ),
    "tokens": Entry(
        DECOUPLED, BUILDERS + "mean", ("weight", "normalize"), base="none", linear=True, elementwise=True, normalize=True,
        by_tokens=True,
    ),
    "radial": Entry(DECOUPLED, BUILDERS + "radial", ("weight",), {"weight": 1.0}, "allowed", normalize=True),
    "median": Entry(ROBUST, BUILDERS + "median", base="none", elementwise=True),
    "trimmed_mean": Entry(ROBUST, BUILDERS + "trimmed_mean", ("trim",), base="none", elementwise=True),
    "slerp": Entry(
        "https://dl.acm.org/doi/10.1145/325334.325242", BUILDERS + "slerp", ("t",), least=2, most=2, first="base"
    ),
    "nuslerp": Entry(
        MERGEKIT, BUILDERS + "nuslerp", ("weight", "nuslerp_row_wise", "nuslerp_flatten"), base="allowed", least=2, most=2
    ),
    "task_arithmetic": Entry(
        "https://arxiv.org/abs/2212.04089", BUILDERS + "task_vectors", TASK, linear=True, elementwise=True, from_vectors=True
    ),
    "wise_ft": Entry(
        "https://arxiv.org/abs/2109.01903", BUILDERS + "wise_ft", ("omega",), most=1, linear=True, elementwise=True,
        from_vectors=True,
    ),
    "ptm": Entry(
        "https://arxiv.org/abs/2410.12937", BUILDERS + "ptm", ("omega",), least=2, first="general", linear=True,
        elementwise=True,
    ),
    "ties": Entry(
        TIES, BUILDERS + "task_vectors", THINNED, from_vectors=True, sparsify="magnitude", elect=True, normalize=True,
        paper={"trim": "global"},
    ),
    "dare": Entry(
        DARE, BUILDERS + "task_vectors", THINNED, elementwise=True, from_vectors=True, sparsify="random", rescale=True
    ),
    "dare_ties": Entry(
        DARE, BUILDERS + "task_vectors", THINNED, elementwise=True, from_vectors=True, sparsify="random", elect=True,
        rescale=True,
    ),
    "della": Entry(
        DELLA, BUILDERS + "task_vectors", (*THINNED, "epsilon"), from_vectors=True, sparsify="magprune", elect=True,
        normalize=True, rescale=True,
    ),
    "della_linear": Entry(
        DELLA, BUILDERS + "task_vectors", (*THINNED, "epsilon"), from_vectors=True, sparsify="magprune", rescale=True
    ),
    "breadcrumbs": Entry(
        BREADCRUMBS, BUILDERS + "task_vectors", (*THINNED, "gamma"), from_vectors=True, sparsify="outliers"
    ),
    "breadcrumbs_ties": Entry(
        BREADCRUMBS, BUILDERS + "task_vectors", (*THINNED, "gamma"), from_vectors=True, sparsify="outliers", elect=True
    ),
    "model_stock": Entry("https://arxiv.org/abs/2403.19522", BUILDERS + "model_stock", ("filter_wise",), least=2),
    "sce": Entry("https://arxiv.org/abs/2408.07990", BUILDERS + "sce", ("select_topk", "int8_mask")),
    "passthrough": Entry(
        MERGEKIT, BUILDERS + "passthrough", ("scale",), base="none", most=1, linear=True, elementwise=True
    ),
}  # fmt: skip

ALIASES = {"linear": "mean", "dare_linear": "dare"}
"""mergekit's names for what has another one here."""

ELSEWHERE = {
    name: "it is a method of mergekit that distmerge does not have"
    for name in ("karcher", "multislerp", "nearswap", "arcee_fusion", "ram", "ramplus_tl")
}


def names() -> list[str]:
    """Every rule's name."""
    return list(ENTRIES)


def canonical(name: str) -> str:
    """The one name of what may be written in several ways; a name that is not known stays as it is."""
    found = name.replace("-", "_")
    found = ALIASES.get(found, found)
    return found if found in ENTRIES else name


def is_known(name: str) -> bool:
    """Whether there is a rule of that name. One that is not in the catalogue yet is looked for among the installed packages'
    rules, whose module then registers it, and with it the parameters that it brings along.

    Raises:
        UserError: when a package offers it and cannot be imported.
    """
    if canonical(name) not in ENTRIES:
        plugins.load_entry_point(name)
    return canonical(name) in ENTRIES


def entry(name: str, where: str = "method") -> Entry:
    """What is known of the rule of that name. One that is not known is looked for among the installed packages' rules.

    Args:
        where: the key in the user's settings that names it, for an error.

    Raises:
        UserError: when there is none.
    """
    if not is_known(name):
        reason = f": {ELSEWHERE[name]}" if name in ELSEWHERE else ""
        raise UserError(f"{where} must be one of {', '.join(ENTRIES)}, got {name!r}{reason}")
    return ENTRIES[canonical(name)]


def register(name: str, made: Entry) -> None:
    """Add a rule under a name of its own.

    Raises:
        UserError: when the name is taken.
    """
    key = name.replace("-", "_")
    if key in ENTRIES or key in ALIASES:
        raise UserError(f"there is a rule {name} already; a rule of your own needs another name")
    ENTRIES[key] = made


def check(
    name: str, where: str, *, members: int | None = None, base: bool = True, tokens: bool = False, whole: bool = True,
    given: tuple[str, ...] | None = None,
) -> Entry:  # fmt: skip
    """The entry of a rule that a place can run; what it lacks there is said in one line.

    Args:
        where: the key that names the rule.
        members: how many there are; None where that is not known yet.
        base: whether there is a base, or the members are deltas.
        tokens: whether it is known there how much each member has trained.
        whole: whether every tensor is whole there, and not cut into shards.
        given: the parameters that the place sets; None where it may set any.

    Raises:
        UserError: naming the capability that is missing.
    """
    found = entry(name, where)
    said = f"{where} = {canonical(name)!r}"
    if found.by_tokens and not tokens:
        raise UserError(f"{said} needs the tokens and steps of a round, which workers alone know; give weights to the mean")
    if found.base == "needed" and not base:
        raise UserError(f"{said} needs a base, which there is none of here")
    if not found.elementwise and not whole:
        raise UserError(f"{said} needs whole tensors, which are cut into shards here; elementwise rules do not")
    if members is not None and not found.least <= members <= (found.most or members):
        count = f"at least {found.least}" if found.most is None else f"{found.least}"
        raise UserError(f"{said} takes {count} member{'s' if count != '1' else ''}, got {members}")
    missing = [key for key in found.parameters if key != "weight" and found.default(key) is REQUIRED]
    for key in missing if given is not None else ():
        if given is not None and key not in given:
            raise UserError(f"{said} needs {key}, which cannot be given here")
    return found


def describe(name: str) -> str:
    """A line about a rule: its parameters, what it needs, its source."""
    found = entry(name)
    needs = [
        *(["a base"] if found.base == "needed" else []),
        *([] if found.elementwise else ["whole tensors"]),
        *([f"{found.least} members"] if found.least > 1 else []),
    ]
    said = f"{canonical(name)}({', '.join(found.parameters)})"
    return f"{said}, needs {' and '.join(needs)}: {found.source}" if needs else f"{said}: {found.source}"


def variants(name: str, compat: str, chosen: dict[str, str]) -> dict[str, str]:
    """Every variant of a rule: as chosen, or as ``compat`` has it, a key of ``FORMS``.

    Raises:
        UserError: when a value is not allowed, or does not go with the others.
    """
    for key, value in chosen.items():
        if value not in VARIANTS[key]:
            raise UserError(f"{key} must be one of {', '.join(VARIANTS[key])}, got {value!r}")
    own = entry(name).paper if compat == "paper" else {}
    found = FORMS[compat] | own | chosen
    if found["trim"] == "global" and chosen.get("on_tie") == "first":
        raise UserError('on_tie = "first" needs trim = "tensor": a global trim keeps all that equal its threshold')
    return found


def settled(name: str, compat: str, chosen: dict[str, str], shared: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a merge, ``normalize`` and ``rescale`` settled where they follow from the rule and the form."""
    found, made = entry(name), dict(shared)
    if "normalize" in found.parameters:
        if made.get("normalize") is None:
            made["normalize"] = found.normalize or compat == "workers" or (compat == "paper" and found.elect)
        if "divide" in chosen and "lambda" in found.parameters:
            made["normalize"] = True
    if "rescale" in found.parameters and made.get("rescale") is None:
        made["rescale"] = found.rescale or "rescale" in chosen
    return made


def divisor(name: str, compat: str, chosen: dict[str, str], shared: dict[str, Any]) -> str:
    """By what a sum of task vectors, or of models, is divided: "weights", "count" or "none"."""
    found = entry(name)
    if not settled(name, compat, chosen, shared).get("normalize", found.normalize):
        return "none"
    return variants(name, compat, chosen)["divide"] if "lambda" in found.parameters else "weights"


def build(name: str, target: Target) -> Rule:
    """The rule of that name for one tensor. Parameters that the target leaves out have their defaults, and so have variants:
    those of ``FORMS["workers"]``, or of the form that ``target.variants["compat"]`` names.

    The builder gets them all, and beside them the variants "compat" and "sparsify"; "elect" and "divide" may be "none".

    Raises:
        UserError: when there is no such rule, or a parameter or variant is missing or wrong.
    """
    found = entry(name)
    compat = target.variants.get("compat", "workers")
    chosen = {key: value for key, value in target.variants.items() if key != "compat"}
    shared = settled(name, compat, chosen, filled(found, target.shared, False, name))
    form = variants(name, compat, chosen) | {"compat": compat, "sparsify": found.sparsify or "none"}
    form["divide"] = divisor(name, compat, chosen, shared)
    if not found.elect:
        form["elect"] = "none"
    each = tuple(filled(found, one, True, name) for one in target.each)
    return found.load()(replace(target, shared=shared, each=each, variants=form))


def filled(found: Entry, given: dict[str, Any], each: bool, name: str) -> dict[str, Any]:
    """The parameters of one kind, with defaults where none is given; a weight is 1."""
    made = dict(given)
    for key in found.parameters:
        if PARAMETERS[key].each != each or key in made:
            continue
        default = 1.0 if key == "weight" else found.default(key)
        if default is REQUIRED:
            raise UserError(f"{key} must be given for {name}")
        made[key] = default
    return made


def spread(
    name: str, members: int, given: dict[str, Any], where: str = "rule"
) -> tuple[tuple[dict[str, Any], ...], dict[str, Any]]:
    """Parameters that are the same for all members as a ``Target`` has them: ``(each, shared)``.

    Raises:
        UserError: when one is none of the rule's, or has no sound value.
    """
    found = entry(name)
    for key in given:
        if key not in found.parameters:
            raise UserError(f"{where}: {name} has no parameter {key}; it takes {', '.join(found.parameters) or 'none'}")
    values = {key: checked(key, value, where) for key, value in given.items()}
    own = {key: value for key, value in values.items() if PARAMETERS[key].each}
    return (own,) * members, {key: value for key, value in values.items() if key not in own}
