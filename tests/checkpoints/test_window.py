"""The window in a run: what a block holds, where it lies, and that a resume inside one changes no bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distmerge.checkpoints.verify import verify_run
from distmerge.errors import UserError
from distmerge.windows.blocks import read_block
from tests.checkpoints.runs import forget_after, lines, parameters, run, same, write_text

WINDOW = {"every": 8, "blocks": 0}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A checkpoint at each step: what the blocks must be the means of."""
    folder = tmp_path_factory.mktemp("plain")
    return run(folder, "plain", text, window=WINDOW, checkpoint={"every": 1, "keep": 40})


def thetas(run_dir: Path, steps: range) -> list[dict[str, torch.Tensor]]:
    return [load_file(run_dir / f"checkpoints/step-{step:08}/parameters-00000.safetensors") for step in steps]


def test_a_block_is_the_mean_of_its_steps(plain: Path) -> None:
    for end in (8, 16, 40):
        block = parameters(plain / f"window/block-{end:08}")
        states = thetas(plain, range(end - 7, end + 1))
        for name, tensor in block.items():
            mean = torch.stack([state[name].double() for state in states]).mean(0)
            torch.testing.assert_close(tensor.double(), mean, rtol=1e-6, atol=1e-7)


def test_a_block_says_where_it_lies(plain: Path) -> None:
    block = read_block(plain / "window/block-00000016")
    tokens = 4 * 32
    assert (block.first_step, block.last_step) == (9, 16)
    assert (block.first_token, block.last_token) == (8 * tokens, 16 * tokens)
    assert block.lr == 4e-3 and not block.tainted
    losses = [line["train/loss"] for line in lines(plain, "metrics.jsonl") if 9 <= line["step"] <= 16]
    assert block.loss == pytest.approx(sum(losses) / 8, rel=1e-5)


def test_transformers_reads_a_block_and_verify_vouches_for_it(plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain / "window/block-00000040")
    assert model.config.model_type == "llama"
    verdicts = {verdict.path: verdict.said for verdict in verify_run(plain)}
    assert verdicts["window/block-00000040"] == "ok"
    assert len([path for path in verdicts if path.startswith("window/")]) == 5


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_resume_inside_a_block_changes_no_bit(tmp_path: Path, text: Path, plain: Path, asynchronous: bool) -> None:
    checkpoint = {"every": 1, "keep": 40, "async": asynchronous}
    resumed = run(tmp_path, "resumed", text, window=WINDOW, checkpoint=checkpoint)
    forget_after(resumed, 13)  # block 16 has begun; block 16 and later ones are on disk already
    assert (resumed / "window/block-00000016").is_dir()
    run(tmp_path, "resumed", text, window=WINDOW, checkpoint=checkpoint)
    for end in (8, 16, 24, 32, 40):
        name = f"window/block-{end:08}"
        assert same(parameters(plain / name), parameters(resumed / name)), name
        assert read_block(plain / name) == read_block(resumed / name)
    assert same(parameters(plain / "final"), parameters(resumed / "final"))


def test_kinds_strides_and_dtypes(tmp_path: Path, text: Path, plain: Path) -> None:
    snapshot = run(tmp_path, "snapshot", text, window=WINDOW | {"kind": "snapshot"})
    state = thetas(plain, range(16, 17))[0]
    block = parameters(snapshot / "window/block-00000016")
    assert all(torch.equal(block[name], state[name]) for name in block)
    strided = run(tmp_path, "strided", text, window=WINDOW | {"stride": 4, "dtype": "bfloat16"})
    block = parameters(strided / "window/block-00000016")
    states = thetas(plain, range(12, 17, 4))
    for name, tensor in block.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, torch.stack([s[name] for s in states]).mean(0).bfloat16())
    assert AutoModelForCausalLM.from_pretrained(strided / "window/block-00000016", dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_offloaded_mean_is_the_same(tmp_path: Path, text: Path, plain: Path, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU here")
    mesh = {"mesh": {"device": device}}
    kept = plain if device == "cpu" else run(tmp_path, "kept", text, window=WINDOW, **mesh)
    directory = run(tmp_path, "offloaded", text, window=WINDOW | {"offload": True}, **mesh)
    for block in sorted((kept / "window").iterdir()):
        assert same(parameters(block), parameters(directory / "window" / block.name))


def test_no_block_spans_a_change_of_the_learning_rate(tmp_path: Path, text: Path) -> None:
    schedule = {"name": "wsd", "warmup": 3, "decay": 10}
    directory = run(tmp_path, "wsd", text, window=WINDOW, schedule=schedule)
    names = sorted(path.name for path in (directory / "window").iterdir())
    assert names == ["block-00000016", "block-00000024"]  # 8 holds the warmup, 32 and 40 the decay, which began after 30


def test_retention_keeps_the_newest_blocks(tmp_path: Path, text: Path) -> None:
    directory = run(tmp_path, "few", text, window={"every_tokens": 8 * 128, "blocks": 2})
    assert sorted(path.name for path in (directory / "window").iterdir()) == ["block-00000032", "block-00000040"]


def test_previews_change_no_bit(tmp_path: Path, text: Path, plain: Path) -> None:
    for store in ("disk", "memory"):
        window = WINDOW | {"store": store}
        seen = run(tmp_path, store, text, window=window, preview={"every": 7, "curve": "1-sqrt", "last": 3})
        assert same(parameters(plain / "final"), parameters(seen / "final"))
        previews = {line["step"]: line["preview/loss"] for line in lines(seen, "metrics.jsonl") if "preview/loss" in line}
        assert sorted(previews) == [21, 28, 35]
    assert not (tmp_path / "memory/window").exists()


def test_memory_and_disk_preview_the_same(tmp_path: Path, text: Path) -> None:
    losses = []
    for store in ("disk", "memory"):
        seen = run(tmp_path, store, text, window=WINDOW | {"store": store}, preview={"every": 40, "last": 4})
        losses.append([line["preview/loss"] for line in lines(seen, "metrics.jsonl") if "preview/loss" in line])
    assert losses[0] == losses[1]


def test_a_full_disk_drops_the_block_and_training_goes_on(tmp_path: Path, text: Path, plain: Path, monkeypatch) -> None:
    from distmerge.windows import blocks

    real = blocks.save_model

    def full_at_16(model, tokenizer, directory, dtype=None):
        if "00000016" in directory.name:
            raise OSError(28, "No space left on device", str(directory))
        real(model, tokenizer, directory, dtype)

    monkeypatch.setattr(blocks, "save_model", full_at_16)
    directory = run(tmp_path, "full", text, window=WINDOW)
    assert not (directory / "window/block-00000016").exists()
    assert not list((directory / "window").glob(".*"))
    dropped = [event for event in lines(directory, "events.jsonl") if event["event"] == "block dropped"]
    assert len(dropped) == 1 and "No space left" in dropped[0]["reason"] and dropped[0]["step"] == 16
    assert same(parameters(plain / "final"), parameters(directory / "final"))


def test_blocks_that_retention_took_are_not_merged_after_going_back(tmp_path: Path, text: Path) -> None:
    sections = {"window": {"every": 8, "blocks": 2}, "preview": {"every": 8, "last": 5}}
    directory = run(tmp_path, "back", text, **sections)
    before = {line["step"]: line["preview/loss"] for line in lines(directory, "metrics.jsonl") if "preview/loss" in line}
    assert [path.name[-2:] for path in sorted((directory / "window").iterdir())] == ["32", "40"]
    forget_after(directory, 20)  # that one knows of blocks 8 and 16, which are gone
    run(tmp_path, "back", text, **sections)
    after = {line["step"]: line["preview/loss"] for line in lines(directory, "metrics.jsonl") if "preview/loss" in line}
    assert 24 not in after and before.keys() - after.keys() == {24}  # one block is none to be merged
    assert after[32] == before[32] and after[40] == before[40]


@pytest.mark.parametrize("harm", ["vanishes", "is damaged", "is another run's"])
def test_a_block_that_is_no_longer_what_was_published_is_left_out_and_said(tmp_path: Path, text: Path, harm: str) -> None:
    """The preview goes on with an older block in its place, as if there had never been the other; training is not touched."""
    sections = {"window": {"every": 4}, "preview": {"every": 8, "last": 2}}
    plain = run(tmp_path, "plain", text, **sections)
    directory = run(tmp_path, "harmed", text, steps=30, **sections)
    place = directory / "window" / "block-00000028"
    if harm == "vanishes":
        shutil.rmtree(place)
    elif harm == "is damaged":
        weights = place / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    else:
        shutil.rmtree(place)
        shutil.copytree(plain / "window" / place.name, place)
    (directory / "summary.json").unlink()
    run(tmp_path, "harmed", text, **sections)
    previews = {line["step"]: line["preview/loss"] for line in lines(directory, "metrics.jsonl") if "preview/loss" in line}
    expected = {line["step"]: line["preview/loss"] for line in lines(plain, "metrics.jsonl") if "preview/loss" in line}
    assert previews[40] == expected[40], "blocks 36 and 40"
    assert 32 in previews and previews[32] != expected[32], "blocks 24 and 32 in place of 28 and 32"
    said = [event for event in lines(directory, "events.jsonl") if event["event"] == "block left out"]
    assert len(said) == (harm != "vanishes") and all(event["block"] == place.name for event in said)
    assert same(parameters(plain / "final"), parameters(directory / "final"))


def test_a_block_that_vanishes_while_the_run_goes_on_is_said_once(tmp_path: Path, text: Path, monkeypatch) -> None:
    from distmerge.windows.preview import Preview

    loss, gone = Preview.loss, tmp_path / "run" / "window" / "block-00000012"

    def without_the_third(self: Preview, step: int) -> float | None:
        if gone.exists():
            shutil.rmtree(gone)
        return loss(self, step)

    monkeypatch.setattr(Preview, "loss", without_the_third)
    directory = run(tmp_path, "run", text, window={"every": 4}, preview={"every": 8, "last": 5})
    said = [event for event in lines(directory, "events.jsonl") if event["event"] == "block left out"]
    assert [(event["step"], event["block"]) for event in said] == [(16, "block-00000012")]
    assert "cannot be read" in said[0]["reason"]
    previews = [line["step"] for line in lines(directory, "metrics.jsonl") if "preview/loss" in line]
    assert previews == [8, 16, 24, 32, 40]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"window": {"every": 8}, "schedule": {"name": "cosine"}}, "schedule.name"),
        ({"window": {"every": 8, "every_tokens": 8}}, "every_tokens is not"),
        ({"window": {}}, "every_tokens is not"),
        ({"window": {"every": 4, "stride": 8}}, "stride"),
        ({"preview": {"every": 4}}, "config.window must be given"),
        ({"window": {"every": 8}, "preview": {"curve": "lineer"}}, "lineer"),
        ({"window": {"evry": 8}}, "every"),
    ],
)
def test_refused_in_one_line(tmp_path: Path, text: Path, sections, words: str) -> None:
    with pytest.raises(UserError) as caught:
        run(tmp_path, "refused", text, **sections)
    assert words in str(caught.value) and "\n" not in str(caught.value)
