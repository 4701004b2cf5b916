"""Stopping rules in runs: bitwise resume, the same decision on all ranks."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from distmerge.config import toml
from distmerge.config.experts import Lora
from distmerge.config.train import Model, TrainConfig
from distmerge.data.packed import open_corpus, sampled
from distmerge.evaluate import evaluate
from distmerge.experts.adapt import Theta, with_lora
from distmerge.experts.stopping import member_at, published_steps
from distmerge.merging.in_memory import merge, read_model
from distmerge.model import build_model, load_model, load_tokenizer
from distmerge.theta.flat import FlatParameters
from tests import jobs
from tests.checkpoints.runs import BASE, forget_after, lines, parameters, run, same, write_text
from tests.ranks import Ranks, command


def test_a_sibling_is_its_newest_step_that_is_not_later(tmp_path: Path) -> None:
    for step in (1, 2, 4):
        (tmp_path / "steps" / f"step-{step:08}").mkdir(parents=True)
    assert list(published_steps(tmp_path)) == [1, 2, 4]
    assert member_at(str(tmp_path), 3, None).name == "step-00000002"
    assert member_at(str(tmp_path), 4, 1.0).name == "step-00000004"
    with pytest.raises(ValueError, match="has no model of step 8"):
        member_at(str(tmp_path), 8, 0.1)  # it is waited for
    assert member_at(str(tmp_path), 8, None).name == "step-00000004"
    (tmp_path / "final").mkdir()
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 4, "stopped": "early"}))
    assert member_at(str(tmp_path), 8, 1.0).name == "final"
    assert member_at(str(tmp_path), 4, 1.0).name == "step-00000004"  # ended by now or not
    with pytest.raises(ValueError, match="nowhere has no model"):
        member_at(str(tmp_path / "nowhere"), 8, None)


# ---- in runs


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    made = run(folder, "base", write_text(folder), steps=10)
    run(folder, "sibling", folder / "text.txt", model={"path": str(made / "final")}, steps=10, seed=4)
    return made


def merged(base: Path, name: str, **more: Any) -> Path:
    """A run whose rate is so high that its merge soon gets worse."""
    stopping = {"rule": "merged", "merge_with": [str(base.parent / "sibling" / "final")], "method": "task_arithmetic"}
    stopping |= {"patience": 1, "after": 1}
    sections = {
        "model": {"path": str(base / "final")},
        "expert": {"skill": "own"},
        "steps": 64,
        "optimizer": {"lr": 0.3},
        "checkpoint": {"every": 3, "at": "powers-of-two"},
        "stopping": stopping,
    }
    return run(base.parent, name, base.parent / "text.txt", **sections | more)


def test_the_merge_is_watched_and_the_best_step_kept(base: Path) -> None:
    made = merged(base, "watched")
    events = [line for line in lines(made, "events.jsonl") if line["event"] == "merged"]
    losses = {event["step"]: event["mean"] for event in events}
    best = min(losses, key=losses.__getitem__)
    summary = json.loads((made / "summary.json").read_text())
    assert summary["stopped"] and summary["steps"] < 64 and list(losses)[-1] == summary["steps"] > best
    assert same(parameters(made / "final"), parameters(made / "steps" / f"step-{best:08}"))
    assert json.loads((made / "final" / "training.json").read_text())["steps"] == best
    # The loss that it saw is that of the merge on disk.
    step = list(losses)[1]
    given = f"merge --method task_arithmetic --base {base}/final --model {made}/steps/step-{step:08}"
    out = base.parent / "by-hand"
    assert command(f"{given} --model {base.parent}/sibling/final --out {out}".split()).status == 0
    vectors = [read_model(str(path), str(base / "final")) for path in (base / "final", made / "steps" / f"step-{step:08}")]
    other, whole = (read_model(str(path), str(base / "final")) for path in (base.parent / "sibling" / "final", out))
    for name in whole:
        by_vector = merge("task_arithmetic", vectors[0][name], [vectors[1][name], other[name]])
        torch.testing.assert_close(by_vector, whole[name], rtol=1e-6, atol=1e-7)


def test_adapters_are_merged_as_whole_models(base: Path) -> None:
    lora = {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "down_proj"]}
    section = {"expert": {"skill": "own", "lora": lora}, "optimizer": {"lr": 3.0}}
    made = merged(base, "adapters", **section)
    losses = {event["step"]: event["mean"] for event in lines(made, "events.jsonl") if event["event"] == "merged"}
    best = min(losses, key=losses.__getitem__)
    assert best < max(losses)  # the rate is so high that the merge gets worse, and the run goes back
    kept, final = (
        load_file(path / "adapter_model.safetensors") for path in (made / "steps" / f"step-{best:08}", made / "final")
    )
    assert same(kept, final)
    # The loss that it saw: of base + B A + the sibling's task vector.
    origin = str(base / "final")
    parts = [read_model(str(path), origin) for path in (base / "final", made / "final", base.parent / "sibling" / "final")]
    model = load_model(origin)
    theta = Theta(model, FlatParameters(model))
    vectors = [theta.of(part) for part in parts]
    theta.write(merge("task_arithmetic", vectors[0], vectors[1:]))
    config = toml.read(str(made / "config.toml"), [])
    by_hand = evaluate(model, sampled(open_corpus(config.data).held_out, config.evaluate.sequences), 4).loss
    assert losses[best] == pytest.approx(by_hand, rel=1e-5)


def test_an_adapted_model_is_a_vector_and_holds_one() -> None:
    plain = build_model(Model.model_validate(BASE["model"]), load_tokenizer("bytes"), 0)
    ids = torch.arange(12)[None]
    untouched = {name: value.detach().clone() for name, value in plain.named_parameters()}
    flat = Theta(plain, FlatParameters(plain))
    base, before = flat.read(), plain.eval()(input_ids=ids).logits.detach()
    adapted = with_lora(copy.deepcopy(plain), Lora(rank=2, targets=["v_proj", "up_proj"]), 0).eval()
    theta = Theta(adapted, FlatParameters(adapted))
    assert list(theta.parameters) == list(untouched) and torch.equal(theta.read(), base)
    for name, value in adapted.named_parameters():
        if "lora_B" in name:
            value.data.normal_(generator=torch.Generator().manual_seed(1))
    whole, bits = theta.read(), [value.detach().clone() for value in adapted.parameters()]
    flat.write(whole)
    torch.testing.assert_close(plain(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
    with theta.holding(base):
        assert torch.equal(adapted(input_ids=ids).logits, before)
    assert all(torch.equal(a, b) for a, b in zip(bits, adapted.parameters(), strict=True))
    assert torch.equal(theta.of(untouched), base)


@pytest.mark.parametrize("rule", ["merged", "plateau"])
def test_a_stopped_run_resumes_bitwise(base: Path, rule: str) -> None:
    more: dict[str, Any] = (
        {} if rule == "merged" else {"stopping": {"rule": "plateau"}, "evaluate": {"every": 2, "sequences": 16}}
    )
    made = merged(base, f"resumed-{rule}", **more)
    summary = json.loads((made / "summary.json").read_text())
    before, record = parameters(made / "final"), (made / "metrics.jsonl").read_text().count("\n")
    assert summary["stopped"]
    forget_after(made, 3)
    merged(base, f"resumed-{rule}", **more)
    again = json.loads((made / "summary.json").read_text())
    assert (again["steps"], again["stopped"]) == (summary["steps"], summary["stopped"])
    assert same(parameters(made / "final"), before)
    assert (made / "metrics.jsonl").read_text().count("\n") == record


def decide(config: str, places: list[float]) -> tuple[int, str | None]:
    """One rank whose own evaluation, left to itself, would decide otherwise than the others'."""
    from distmerge.experts.training import ExpertTraining
    from distmerge.launch.ranks import Place
    from distmerge.trainer import loop

    found = {}
    observe = ExpertTraining.observe

    def skewed(self: ExpertTraining, step: int, loss: float | None) -> None:
        observe(self, step, None if loss is None else places[self.run.mesh.rank] * step)
        found[step] = self.stopped

    ExpertTraining.observe = skewed
    try:
        import os

        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        loop.train(toml.validate(json.loads(config)), Place(rank, world, rank, world), ["test"])
    finally:
        ExpertTraining.observe = observe
        assert not dist.is_initialized()
    return max(found), found[max(found)]


def test_ranks_agree_on_the_end(base: Path, ranks: Ranks) -> None:
    table = BASE | {
        "run_dir": str(base.parent / "agreed"),
        "steps": 40,
        "data": BASE["data"] | {"files": [str(base.parent / "text.txt")]},
        "stopping": {"rule": "plateau", "reductions": 0},
        "evaluate": {"every": 4, "sequences": 8},
    }
    TrainConfig.model_validate(table)
    # The first rank's losses rise, the second's fall: all go by the first.
    (one, why), (two, other) = ranks.run(2, decide, json.dumps(table), [1.0, -1.0], group=False)
    assert one == two == 8 and why == other and why is not None


def test_experts_side_by_side_stop_each_at_its_time(base: Path, tmp_path: Path) -> None:
    config = tmp_path / "experts.toml"
    config.write_text(
        f"""
run_dir = "{tmp_path}/runs"
mode = "side-by-side"
steps = 8
mesh = {{ device = "cpu" }}
model = {{ path = "{base}/final" }}
data = {{ source = "files", files = ["{base.parent}/text.txt"], sequence_length = 32, eval_fraction = 0.2 }}
train = {{ batch_size = 2, threads = 1 }}
stopping = {{ rule = "merged", merge_with = ["siblings"], patience = 1, after = 1 }}
checkpoint = {{ at = "powers-of-two" }}
evaluate = {{ sequences = 8 }}
[[experts]]
skill = "calm"
ranks = 2
optimizer = {{ lr = 1e-4 }}
[[experts]]
skill = "wild"
optimizer = {{ lr = 1.0 }}
"""
    )
    job = jobs.distmerge(["experts", str(config)], tmp_path / "log")
    assert job.wait() == 0, job.output
    summaries = {skill: json.loads((tmp_path / "runs" / skill / "summary.json").read_text()) for skill in ("calm", "wild")}
    assert summaries["calm"]["ranks"] == 2 and summaries["wild"]["ranks"] == 1
    assert summaries["wild"]["stopped"] and summaries["wild"]["steps"] < 8
    events = [line for line in lines(tmp_path / "runs" / "calm", "events.jsonl") if line["event"] == "merged"]
    assert set(events[0]["losses"]) == {"calm", "wild"}
    members = {event["step"]: event["with"][0].rpartition("/")[2] for event in events}
    assert members[1] == "step-00000001" and members[2] == "step-00000002"
