"""A merge's bytes depend on the recipe and the models alone, and the final name never holds a part of one."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.files import digests
from tests.files.models import family, tensors, write

METHODS = {
    "linear": [],
    "ties": ["--density", "0.3", "--trim", "tensor", "--on-tie", "first"],
    "ties-global": ["--density", "0.3"],
    "dare_ties": ["--density", "0.4"],
    "dare_linear": ["--density", "0.4", "--compat", "mergekit"],
    "della": ["--density", "0.5", "--compat", "mergekit"],
    "breadcrumbs": ["--density", "0.5", "--gamma", "0.1", "--on-tie", "first"],
    "sce": ["--select-topk", "0.3"],
    "model_stock": [],
    "nuslerp": [],
}


def merge(method: str, models: list[Path], out: Path, *flags: str) -> dict[str, torch.Tensor]:
    base, *members = models
    named = ["--base", str(base)] if method != "linear" else []
    for member in members:
        named += ["--model", str(member)]
    assert main.run(["merge", "--method", method, *named, "--out", str(out), *flags]) == 0
    found = {}
    for file in sorted(out.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", METHODS)
def test_threads_chunks_and_shards_do_not_matter(name, tmp_path):
    models, sharded = family(tmp_path / "whole"), family(tmp_path / "sharded", shards=3)
    method = name.split("-")[0]
    one = merge(method, models, tmp_path / "one", "--threads", "1", *METHODS[name])
    ways = (("2", "524288"), ("4", "1"), ("3", "1000000"))
    for index, (threads, chunk) in enumerate(ways):
        out = tmp_path / f"way{index}"
        assert same(one, merge(method, models, out, "--threads", threads, "--chunk", chunk, *METHODS[name]))
    assert same(one, merge(method, sharded, tmp_path / "other", "--shard-size", "500KB", *METHODS[name]))
    assert len(list((tmp_path / "other").glob("model-*-of-*.safetensors"))) > 1


@pytest.mark.parametrize("sampled", [True, False])
def test_a_global_trim_reads_everything_once_more(sampled, tmp_path, monkeypatch):
    """A sample says where the threshold is. When it misleads, the result is the same."""
    from distmerge.merging import survey

    passes: list[bool] = []
    settle = survey.ThresholdSurvey.settle

    def counted(self, tally):
        if self._lows is None and not sampled:
            tally.added["counts"] = tally.added["counts"].flip(1) if not passes else tally.added["counts"]
        passes.append(settle(self, tally))
        return passes[-1]

    models = family(tmp_path)
    expected = merge("ties", models, tmp_path / "one", "--density", "0.3")
    monkeypatch.setattr(survey.ThresholdSurvey, "settle", counted)
    monkeypatch.setattr(survey, "SAMPLE", 2)  # the models are too small for a small sample
    assert same(expected, merge("ties", models, tmp_path / "two", "--density", "0.3"))
    assert passes == ([False, True] if sampled else [False, False, False, True])


def test_linear_is_the_mean(tmp_path):
    paths = [write(tmp_path / f"m{i}", tensors(i, dtype)) for i, dtype in enumerate([torch.float32, torch.float32])]
    (out,) = [merge("linear", [paths[0], *paths], tmp_path / "out")]
    one, two = (load_file(path / "model.safetensors") for path in paths)
    for name, value in out.items():
        assert torch.allclose(value, (one[name] + two[name]) / 2, rtol=1e-6, atol=0)


def test_output_loads_anywhere_and_says_what_it_is(tmp_path):
    models = family(tmp_path)
    merge("linear", models, tmp_path / "out", "--shard-size", "300KB", "--out-dtype", "float32")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.get_tensor(name).dtype == torch.float32
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert set(record["outputs"]) == set(index["weight_map"].values())
    assert {Path(path).parent.name for path in record["inputs"]} == {"m0", "m1"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "float32"
    assert "arxiv.org/abs/2203.05482" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("head_start", [0, 1000, 1 << 30])
def test_hashes_are_of_whole_files(head_start, tmp_path, monkeypatch):
    monkeypatch.setattr(digests, "HEAD_START_BYTES", head_start)
    monkeypatch.setattr(digests, "PIECE_BYTES", 300)
    merge("linear", family(tmp_path, shards=2), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "merge.json").read_text())
    found = record["inputs"] | {str(tmp_path / "out" / name): entry for name, entry in record["outputs"].items()}
    assert len(found) == 5
    for path, entry in found.items():
        assert entry == {"bytes": Path(path).stat().st_size, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}


def test_verify(tmp_path, capsys):
    out = tmp_path / "out"
    merge("linear", family(tmp_path), out)
    assert main.run(["merge", "--verify", str(out)]) == 0
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match=r"model.safetensors does not have the SHA-256"):
        main.run(["merge", "--verify", str(out)])


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "ties-global", "dare_ties", "della"])
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_nothing_is_published_after_an_error(method, value, tmp_path):
    models = family(tmp_path)
    broken = load_file(models[1] / "model.safetensors")
    broken["model.norm.weight"][0] = value
    bad = write(tmp_path / "bad", broken)
    flags = ["--density", "1"] if method == "dare_ties" else METHODS.get(method, [])
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinity in .*bad"):
        merge(method.split("-")[0], [models[0], bad, models[2]], tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.merging").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    models = family(tmp_path)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left on device; nothing was published"):
        merge("linear", models, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.merging").exists()


def test_an_existing_directory_is_refused(tmp_path):
    models = family(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    for name in ("out", "link"):
        with pytest.raises(UserError, match="must not exist yet"):
            merge("linear", models, tmp_path / name)


KILLED = """
import os, signal, sys
from distmerge.cli import main
from distmerge.files import output
writes = [0]
write = output.Output.write
def counted(self, *rest):
    if writes[0] == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    writes[0] += 1
    write(self, *rest)
output.Output.write = counted
output.SYNC_SECONDS = 0.0
from distmerge.files import stream
stream.BATCH_BLOCKS = 1
main.run(sys.argv[2:])
"""


@pytest.mark.parametrize("writes", [0, 3, 8])
def test_killed_and_started_again_gives_the_same_bytes(writes, tmp_path):
    models = family(tmp_path)
    flags = ["--density", "0.4", "--shard-size", "1400KB", "--threads", "2"]
    whole = merge("dare_ties", models, tmp_path / "whole", *flags)
    out = tmp_path / "out"
    command = ["merge", "--method", "dare_ties", "--base", str(models[0]), "--out", str(out), *flags]
    command += ["--model", str(models[1]), "--model", str(models[2])]
    process = subprocess.run([sys.executable, "-c", KILLED, str(writes), *command], env=os.environ)
    assert process.returncode == -signal.SIGKILL
    assert not out.exists() and (tmp_path / ".out.merging").exists()
    if writes == 8:
        assert len((tmp_path / ".out.merging" / "journal.jsonl").read_text().splitlines()) > 2
    assert same(whole, merge("dare_ties", models, out, *flags))
    assert not (tmp_path / ".out.merging").exists()
    assert main.run(["merge", "--verify", str(out)]) == 0


def test_a_second_merge_of_the_same_name_is_refused(tmp_path):
    from distmerge.files.output import Output

    first = Output(tmp_path / "out", "one", [])
    with pytest.raises(UserError, match="another merge is writing"):
        Output(tmp_path / "out", "one", [])
    first.publish({})
    assert list((tmp_path / "out").iterdir()) == []


def test_the_lock_is_held_until_the_directory_has_its_name(tmp_path, monkeypatch):
    from distmerge.files.output import Output

    rename, tried = os.rename, []

    def renamed(path: Path, target: Path) -> None:
        with pytest.raises(UserError, match="another merge is writing"):
            Output(target, "two", [])
        rename(path, target)
        with pytest.raises(UserError, match="must not exist yet"):
            Output(target, "three", [])
        tried.append(target)

    first = Output(tmp_path / "out", "one", [])
    monkeypatch.setattr(os, "rename", renamed)
    first.publish({"config.json": b"{}"})
    assert tried == [tmp_path / "out"] and [path.name for path in tried[0].iterdir()] == ["config.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_stochastic_rounding_keeps_the_mean(tmp_path):
    from distmerge.files.rounding import Rounding

    values = torch.full((1 << 18,), 1.0 + 0.3 * 2**-7)
    rounded = Rounding(7).to(torch.bfloat16, values, "x", 0)
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(float((rounded.float() - 1).mean()) / 2**-7 - 0.3) < 0.01
    assert torch.equal(rounded[1000:2000], Rounding(7).to(torch.bfloat16, values[1000:2000], "x", 1000))
    assert float(Rounding(None).to(torch.bfloat16, values, "x", 0).float().mean()) == 1.0
