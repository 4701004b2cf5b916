"""What the rules' rows declare, proved on every rule; and that files give what memory gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.rules import catalogue
from distmerge.rules.mean import token_weight
from distmerge.rules.protocol import Target, cut, run, settled_state
from tests.files.models import SHAPES, tensors, write
from tests.rules.rows import SHAPE, TWELVE, Row, members_of, rows

every_rule = pytest.mark.parametrize("row", rows(), ids=str)


def near(one: Tensor, two: Tensor) -> bool:
    """Equal but for rounding: to 1e-6 of the largest element."""
    return bool((one - two).abs().max() <= 1e-6 * two.abs().max().clamp(min=1e-30))


def test_every_rule_has_a_row() -> None:
    ours = {name for name in catalogue.names() if isinstance(catalogue.entry(name).builder, str)}
    assert ours <= {catalogue.canonical(row.name) for row in rows()}


@every_rule
def test_the_catalogue_knows_what_the_rule_says_of_itself(row: Row) -> None:
    rule, entry = row.build(row.count), row.entry
    assert rule.linear <= entry.linear or row.given.get("density", 1.0) == 1.0
    assert entry.linear <= rule.linear and (entry.base != "none" or not rule.needs_base)
    assert (rule.passes == 0 and rule.unit == 1) or not entry.elementwise or "rescale" in row.variants
    assert max(rule.least, entry.least) == entry.least and (rule.most or 9) >= (entry.most or 9)


@every_rule
def test_any_number_of_members_that_it_takes(row: Row) -> None:
    for count in row.counts:
        members = members_of(count)
        before = [member.clone() for member in members]
        merged = run(row.build(count), members)
        assert merged.shape == SHAPE and merged.dtype == torch.float32 and bool(torch.isfinite(merged).all())
        assert all(torch.equal(one, two) for one, two in zip(members, before, strict=True))


@every_rule
def test_deltas_do_without_a_base(row: Row) -> None:
    """With a base of zeros the merged delta is the same to the bit; with models it is added to theirs, to rounding."""
    rule, members = row.build(row.count), members_of(row.count)
    merged = run(rule, members)
    assert rule.needs_base or torch.equal(merged, run(rule, members, torch.zeros(SHAPE)))
    if row.entry.base == "needed" and row.entry.first != "base":
        base = torch.full(SHAPE, 0.25)  # bfloat16 numbers of this size are added to it without an error
        assert (run(rule, [base + member for member in members], base) - base - merged).abs().max() < 1e-7


@every_rule
def test_the_order_of_the_members(row: Row) -> None:
    members = members_of(row.count)
    merged, turned = (run(row.build(row.count), some) for some in (members, members[::-1]))
    assert len(members) == 1 or near(merged, turned) == row.permutes


@every_rule
def test_identical_members(row: Row) -> None:
    if row.fixed:
        (member,) = members_of(1)
        for count in row.counts:
            assert near(run(row.build(count), [member] * count), member)


@every_rule
def test_twice_the_deltas(row: Row) -> None:
    members = members_of(row.count)
    merged, twice = (run(row.build(row.count), [factor * member for member in members]) for factor in (1, 2))
    assert not row.scales or torch.equal(twice, 2 * merged)


@every_rule
def test_the_seed(row: Row) -> None:
    members = members_of(row.count)
    one, again, other = (run(row.build(row.count, seed=seed), members) for seed in (1, 1, 2))
    assert torch.equal(one, again) and torch.equal(one, other) != row.seeded


@every_rule
@pytest.mark.parametrize("at", [0, 1000, 37 * 53 - 1])
def test_what_is_not_a_number_shows_or_the_rule_says_that_it_may_hide(row: Row, at: int) -> None:
    for index in range(row.count):
        members = members_of(row.count)
        members[index].view(-1)[at] = float("nan")
        rule = row.build(row.count)
        merged = run(rule, members)
        shows = bool(torch.isnan(merged.view(-1)[at]))
        assert shows or rule.hides(settled_state(rule, cut(rule, members)))


@every_rule
def test_any_size_of_a_block(row: Row) -> None:
    rule, members = row.build(row.count), members_of(row.count)
    whole = run(rule, members)
    for block in (64, 500, 1000):
        found = run(rule, members, block=block)
        assert torch.equal(found, whole) if rule.exact else near(found, whole), block


@every_rule
def test_a_linear_rule_is_the_sum_that_it_says(row: Row) -> None:
    rule, members = row.build(row.count), members_of(row.count)
    if rule.linear:
        total = sum(factor * member.double() for factor, member in zip(rule.coefficients.tolist(), members, strict=True))
        assert near(run(rule, members).double(), torch.as_tensor(total))


@every_rule
@pytest.mark.parametrize("on_tie", ["keep", "first"])
def test_the_part_of_each_member_and_then_the_part_across_them_is_the_whole(row: Row, on_tie: str) -> None:
    for count in row.counts:
        target = row.target(count, seed=5, variants=row.variants | {"on_tie": on_tie})
        if "weight" in row.entry.parameters:
            target = replace(target, each=tuple(one | {"weight": 0.3 + index} for index, one in enumerate(target.each)))
        rule = catalogue.build(row.name, target)
        members = members_of(count)
        if rule.parts is None:
            continue
        parts, across = rule.parts
        assert across.passes == 0 and across.unit == 1 and len(parts) == count
        thinned = [run(part, [member], block=500) for part, member in zip(parts, members, strict=True)]
        assert torch.equal(run(across, thinned, block=64), run(rule, members, torch.zeros(SHAPE), block=500))


def test_the_rules_that_have_parts() -> None:
    found = {catalogue.canonical(row.name) for row in rows() if row.build(row.count).parts is not None}
    assert found == {
        "ties", "dare", "dare_ties", "della", "della_linear", "breadcrumbs", "breadcrumbs_ties",
    }  # fmt: skip


# ---- from files as from memory


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models near it, float32."""
    root = tmp_path_factory.mktemp("models")
    base = tensors(0, torch.float32)
    for index in range(4):
        write(root / (f"m{index}" if index else "base"), tensors(index, torch.float32, base) if index else base)
    return root


def recipe(row: Row, root: Path, count: int) -> str:
    """The row's merge of ``count`` models as a recipe."""
    quoted = {key: f'"{value}"' for key, value in ({"trim": "tensor"} | row.variants).items()}
    numbers = {key: str(value).lower() for key, value in row.given.items()}
    words = {} if "trim" in numbers else quoted
    named = [f"m{index + 1}" for index in range(count)]
    lines = [f'method = "{row.name}"', f'base = "{root / "base"}"']
    if row.entry.first == "general":
        lines.append(f'general = "{root / named[0]}"')
        named = named[1:]
    elif row.entry.first == "base":
        named = named[:1]
    lines += [f"{key} = {value}" for key, value in (words | numbers).items()]
    weight = "\nweight = 1.0" if "weight" in row.entry.parameters else ""
    return "\n".join([*lines, *(f'[[model]]\npath = "{root / name}"{weight}' for name in named)]) + "\n"


@every_rule
def test_files_give_what_memory_gives(row: Row, models: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "recipe.toml", tmp_path / "out"
    path.write_text(recipe(row, models, row.count))
    if not row.on_disk:
        with pytest.raises(UserError, match="needs the tokens and steps of a round"):
            main.run(["merge", str(path), "--out", str(out)])
        return
    torch.set_num_threads(1)
    assert main.run(["merge", str(path), "--out", str(out)]) == 0
    merged = load_file(out / "model.safetensors")
    base, *others = [load_file(models / name / "model.safetensors") for name in ("base", "m1", "m2", "m3")]
    chosen: list[dict[str, Any]] = others[: row.count]
    if row.entry.first == "base":
        chosen = [base, *others[: row.count - 1]]
    based = row.entry.base != "none" and row.entry.first != "base"
    for name, shape in SHAPES.items():
        form = {"compat": "paper", "trim": "tensor"} | row.variants
        embedding = shape[0] == 300
        rule = row.build(row.count, shape=shape, name=name, variants=form, embedding=embedding)
        expected = run(rule, [member[name] for member in chosen], base[name] if based else None)
        assert torch.equal(merged[name], expected), name


def test_tokens_from_files_are_the_mean_with_the_weights_that_tokens_give(models: Path, tmp_path: Path) -> None:
    """Files do not say what a model trained on in a round, so their user does: a recipe of the mean with those weights."""
    weights = [token_weight(tokens, steps) for tokens, steps in ((100.0, 2), (300.0, 3), (50.0, 1))]
    given = "".join(
        f'[[model]]\npath = "{models / f"m{index + 1}"}"\nweight = {weight}\n' for index, weight in enumerate(weights)
    )
    (tmp_path / "recipe.toml").write_text('method = "mean"\n' + given)
    torch.set_num_threads(1)
    assert main.run(["merge", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "out")]) == 0
    merged = load_file(tmp_path / "out" / "model.safetensors")
    members = [load_file(models / f"m{index + 1}" / "model.safetensors") for index in range(3)]
    for name, shape in SHAPES.items():
        target = Target(name, shape, tuple({"weight": weight} for weight in weights))
        assert torch.equal(merged[name], run(catalogue.build("tokens", target), [member[name] for member in members])), name


def test_files_and_memory_are_compared_for_each_rule_that_must_agree() -> None:
    """All are, as their rows; ``tokens`` above, as the mean that it is."""
    assert TWELVE - {row.name for row in rows() if row.on_disk} == {"tokens"}
