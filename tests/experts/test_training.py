"""Experts in the trainer: published steps, what they were trained on, LoRA, instruction data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from distmerge.merging.in_memory import merge, read_model
from tests.checkpoints.runs import forget_after, lines, parameters, run, same, write_text
from tests.ranks import command


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that was trained a little, and the text beside it."""
    folder = tmp_path_factory.mktemp("base")
    return run(folder, "base", write_text(folder), steps=8)


def expert(base: Path, name: str, **sections) -> Path:
    given = {"model": {"path": str(base / "final")}, "expert": {"skill": name}, "steps": 12} | sections
    return run(base.parent, name, base.parent / "text.txt", **given)


def test_steps_are_published_at_powers_of_two(base: Path) -> None:
    made = expert(base, "powers", checkpoint={"every": 10, "at": "powers-of-two"})
    assert sorted(path.name for path in (made / "steps").iterdir()) == [f"step-{at:08}" for at in (1, 2, 4, 8, 12)]
    assert same(parameters(made / "steps" / "step-00000012"), parameters(made / "final"))
    said = [json.loads((made / "steps" / f"step-{at:08}" / "training.json").read_text()) for at in (1, 4)]
    assert [record["tokens"] for record in said] == [4 * 32, 4 * 4 * 32]
    final = json.loads((made / "final" / "training.json").read_text())
    assert final["steps"] == 12 and final["tokens"] == 12 * 4 * 32 and final["skill"] == "powers"
    assert final["base"] == str(base / "final")


def test_ptm_reads_the_tokens_of_two_runs(base: Path, tmp_path: Path) -> None:
    general = expert(base, "general", steps=10)
    skill = expert(base, "skill", steps=5, seed=1)
    given = f"merge --method ptm --base {base}/final --general {general}/final --model {skill}/final --out {tmp_path}/out"
    outcome = command(given.split())
    assert outcome.status == 0, outcome.stderr
    assert "640 / 1280 training tokens = 0.5" in outcome.stdout
    b, g, d, out = (parameters(path) for path in (base / "final", general / "final", skill / "final", tmp_path / "out"))
    for name in b:
        torch.testing.assert_close(out[name], g[name] + 0.5 * (d[name] - b[name]), rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def half(base: Path) -> Path:
    """The base in bfloat16, as most bases are published."""
    out = base.parent / "half" / "final"
    given = f"merge --method passthrough --model {base}/final --out-dtype bfloat16 --out {out}"
    assert command(given.split()).status == 0
    return out.parent


def test_experts_are_published_in_the_dtype_of_their_base(base: Path, half: Path, tmp_path: Path) -> None:
    section = {"checkpoint": {"every": 5, "at": "every"}, "model": {"path": str(half / "final")}}
    made = expert(base, "of-half", **section)
    wide = expert(base, "wide", **section | {"checkpoint": {"every": 5, "at": "every", "dtype": "float32"}})
    for name in ("final", "steps/step-00000005", "steps/step-00000012"):
        ours, theirs = (load_file(path / name / "model.safetensors") for path in (made, wide))
        assert {value.dtype for value in ours.values()} == {torch.bfloat16}
        assert {value.dtype for value in theirs.values()} == {torch.float32}
        assert all(torch.equal(ours[key], theirs[key].bfloat16()) for key in ours), "training itself is the same"
        assert json.loads((made / name / "config.json").read_text())["dtype"] == "bfloat16"
    before = load_file(made / "final" / "model.safetensors")
    forget_after(made, 5)
    expert(base, "of-half", **section)
    assert same(before, load_file(made / "final" / "model.safetensors")), "a resume goes on from float32"
    models = f"--model {made}/final --model {made}/steps/step-00000005"
    given = f"merge --method task_arithmetic --base {half}/final {models} --lambda 0.5 --out {tmp_path}/out"
    assert command(given.split()).status == 0
    out, origin = load_file(tmp_path / "out" / "model.safetensors"), load_file(half / "final" / "model.safetensors")
    fifth = load_file(made / "steps" / "step-00000005" / "model.safetensors")
    for key, value in out.items():
        wanted = origin[key].float() + 0.5 * (before[key].float() + fifth[key].float() - 2 * origin[key].float())
        assert torch.equal(value, wanted.bfloat16()), key


LORA = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "down_proj"]}


def test_lora_experts_train_merge_exactly_and_extract_back(base: Path, tmp_path: Path) -> None:
    section = {"optimizer": {"lr": 3e-2}, "checkpoint": {"every": 10, "at": "powers-of-two"}}
    one = expert(base, "one", **section | {"expert": {"skill": "one", "lora": LORA}})
    two = expert(base, "two", **section | {"expert": {"skill": "two", "lora": LORA}, "seed": 3, "steps": 6})
    losses = [line["eval/loss"] for line in lines(one, "metrics.jsonl") if "eval/loss" in line]
    assert losses[-1] < losses[0]
    origin = str(base / "final")
    models = [f"--base {origin} --model {one}/final --model {two}/final", f"--out {tmp_path}/cat"]
    assert command(f"merge --method cat {' '.join(models)}".split()).status == 0
    b, first, second, whole = (read_model(path, origin) for path in (origin, f"{one}/final", f"{two}/final", f"{tmp_path}/cat"))
    changed = [name for name in b if not torch.equal(first[name], b[name])]
    assert sorted(name.split(".")[-2] for name in changed) == ["down_proj", "q_proj"]
    for name in b:
        torch.testing.assert_close(whole[name] - b[name], first[name] + second[name] - 2 * b[name], rtol=1e-4, atol=1e-6)
    assert command(f"eval {tmp_path}/cat --files {base.parent}/text.txt --sequence-length 32".split()).status == 0
    # An adapter's training is recorded beside it, not beside the base that it is on.
    ptm = f"merge --method ptm --base {origin} --general {one}/final --model {two}/final --out {tmp_path}/ptm"
    assert "training tokens = 0.5\n" in command(ptm.split()).stdout
    # A full model of it, and the adapter extracted back from the difference.
    assert command(f"merge --method linear --model {origin}+{one}/final --out {tmp_path}/full".split()).status == 0
    given = f"merge --method extract --rank 2 --base {origin} --model {tmp_path}/full --out {tmp_path}/back"
    assert command(given.split()).status == 0
    back = read_model(f"{tmp_path}/back", origin)
    for name in b:
        torch.testing.assert_close(back[name] - b[name], first[name] - b[name], rtol=1e-3, atol=1e-5)


def test_a_lora_run_resumes_bitwise(base: Path) -> None:
    section = {"optimizer": {"lr": 3e-2}, "checkpoint": {"every": 5}, "expert": {"skill": "again", "lora": LORA}}
    made = expert(base, "again", **section)
    before = load_file(made / "final" / "adapter_model.safetensors")
    forget_after(made, 5)
    expert(base, "again", **section)
    assert same(before, load_file(made / "final" / "adapter_model.safetensors"))


@pytest.mark.parametrize("method", ["mean", "task_arithmetic", "ties", "dare", "ptm"])
def test_merges_of_flat_vectors_are_the_formulas(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base, one, two = torch.randn(3, 1001, generator=generator)
    got = merge(method, base, [one, two], scale=0.7, density=0.25, seed=5)
    a, b = one - base, two - base
    if method == "mean":
        wanted = base + 0.7 * (a + b) / 2
    elif method == "task_arithmetic":
        wanted = base + 0.7 * (a + b)
    elif method == "ptm":
        wanted = one + 0.7 * b
    elif method == "ties":
        kept = torch.stack([d * (d.abs() >= d.abs().topk(250).values[-1]) for d in (a, b)])
        agree = kept * (kept.sign() == kept.sum(0).sign())
        wanted = base + 0.7 * agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
    else:
        rate = [float(((got - base).abs() > 0).float().mean()), 1 - 0.75**2]
        assert abs(rate[0] - rate[1]) < 0.05
        assert torch.equal(got, merge(method, base, [one, two], scale=0.7, density=0.25, seed=5))
        candidates = torch.stack([base, base + 2.8 * a, base + 2.8 * b, base + 2.8 * (a + b)])
        assert ((candidates - got).abs().amin(0) < 1e-5).all()
        return
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
