"""What a model may be: a DCP directory, a window's block, a hub id in the cache; each merges as the plain directory does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from distmerge.cli import main
from distmerge.errors import UserError
from distmerge.files import directories
from distmerge.windows.blocks import Block, publish_block
from tests.files.models import family, write


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return family(tmp_path_factory.mktemp("inputs"))


def merge(base: Path | str, model: Path | str, out: Path, *flags: str) -> dict[str, torch.Tensor]:
    named = ["--base", str(base), "--model", str(model), "--out", str(out)]
    assert main.run(["merge", "--method", "task_arithmetic", "--lambda", "0.5", *named, *flags]) == 0
    return load_file(out / "model.safetensors")


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def as_dcp(source: Path, target: Path) -> None:
    state = {"model": load_file(source / "model.safetensors"), "optimizer": {"m": torch.zeros(3)}}
    save(state, checkpoint_id=str(target), no_dist=True)


def test_a_dcp_directory(paths, tmp_path):
    base, one, two = paths
    as_dcp(one, tmp_path / "dcp")
    with pytest.raises(UserError, match="allow it with --allow-pickle"):
        merge(base, tmp_path / "dcp", tmp_path / "out")
    expected = merge(base, one, tmp_path / "plain")
    assert same(expected, merge(base, tmp_path / "dcp", tmp_path / "out", "--allow-pickle"))
    assert str(tmp_path / "dcp") in (tmp_path / "out" / "merge.json").read_text()
    assert directories.verify(tmp_path / "dcp.converted") is None, "what was converted is published with its hashes"
    as_dcp(two, tmp_path / "dcp")  # the directory's next save: what was converted before is stale
    other = merge(base, tmp_path / "dcp", tmp_path / "again", "--allow-pickle")
    assert same(other, merge(base, two, tmp_path / "other")) and not same(other, expected)


def test_a_dcp_directory_as_base_and_under_an_adapter_flag(paths, tmp_path, capsys):
    as_dcp(paths[0], tmp_path / "dcp")
    out = merge(tmp_path / "dcp", paths[1], tmp_path / "out", "--allow-pickle")
    assert same(out, merge(paths[0], paths[1], tmp_path / "plain"))
    flags = ["--base", str(tmp_path / "dcp"), *map(str, paths[1:]), "--allow-pickle", "--json"]
    capsys.readouterr()
    assert main.run(["diagnose", *flags]) == 0
    assert len(json.loads(capsys.readouterr().out)["whole"]["norms"]) == 2


def test_a_damaged_dcp_directory_is_one_line(paths, tmp_path):
    as_dcp(paths[1], tmp_path / "dcp")
    (tmp_path / "dcp" / ".metadata").write_bytes(b"\x80\x04nothing")
    with pytest.raises(UserError, match="cannot read the DCP checkpoint"):
        merge(paths[0], tmp_path / "dcp", tmp_path / "out", "--allow-pickle")
    assert not (tmp_path / "out").exists()


def test_blocks_of_a_window(tmp_path):
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=384,
        tie_word_embeddings=True,
    )  # fmt: skip
    blocks = []
    for index in range(3):
        torch.manual_seed(index)
        block = Block(8 * index + 1, 8 * index + 8, 100 * index, 100 * index + 100, 1e-3, 2.0, "mean", 0)
        blocks.append(publish_block(tmp_path / "window", block, LlamaForCausalLM(config), ByT5Tokenizer(), "float32"))
    base, one, _ = (load_file(block / "model.safetensors") for block in blocks)
    out = merge(blocks[0], blocks[1], tmp_path / "out")
    for name, value in out.items():
        torch.testing.assert_close(value, base[name] + 0.5 * (one[name] - base[name]))
    assert LlamaForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 16
    raw = bytearray((blocks[1] / "model.safetensors").read_bytes())
    raw[-2] ^= 1
    (blocks[1] / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError, match=r"block-00000016/model.safetensors does not have the XXH128 in the record beside it"):
        merge(blocks[0], blocks[1], tmp_path / "damaged")
    assert not (tmp_path / "damaged").exists()


def in_cache(hub: Path, name: str, model: Path, revision: str = "main") -> None:
    """A model as the hub's cache holds it: blobs, a snapshot of links to them, a reference to the snapshot."""
    root, commit = hub / f"models--{name.replace('/', '--')}", f"{len(revision):040x}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir(exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for file in model.iterdir():
        blob = root / "blobs" / f"{commit}-{file.name}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))


def test_hub_ids_come_from_the_cache(paths, tmp_path):
    base, one, two = paths
    in_cache(tmp_path / "hub", "someone/base", base)
    in_cache(tmp_path / "hub", "someone/tuned-7B", one)
    in_cache(tmp_path / "hub", "someone/tuned-7B", two, "v2")
    recipe = tmp_path / "recipe.yaml"
    text = "merge_method: task_arithmetic\nbase_model: someone/base\nmodels:\n- model: {}\n  parameters: {{weight: 0.5}}\n"
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def run(model: str, out: Path) -> subprocess.CompletedProcess[str]:
        recipe.write_text(text.format(model))
        command = [sys.executable, "-m", "distmerge", "merge", str(recipe), "--compat", "paper", "--out", str(out)]
        return subprocess.run(command, capture_output=True, text=True, env=environment)

    for model, local in (("someone/tuned-7B", one), ("someone/tuned-7B@v2", two)):
        out = tmp_path / f"out-{local.name}"
        done = run(model, out)
        assert done.returncode == 0, done.stderr
        assert same(load_file(out / "model.safetensors"), merge(base, local, tmp_path / f"plain-{local.name}"))
        assert "base_model:\n- someone/base\n" in (out / "README.md").read_text()
    missing = run("someone/absent", tmp_path / "out-absent")
    assert missing.returncode == 2 and missing.stderr.count("\n") == 1
    assert missing.stderr.startswith("error: someone/absent is not a directory here, and cannot be downloaded from the hub: ")


# ---- what is no model, and what nobody could load


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_a_pipe_among_a_models_files_is_refused_and_not_waited_for(name, paths, tmp_path):
    shutil.copytree(paths[1], tmp_path / "bad")
    (tmp_path / "bad" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "bad" / name)
    with pytest.raises(UserError, match=f"{name} must be a regular file"):
        merge(paths[0], tmp_path / "bad", tmp_path / "out")


def test_an_output_that_would_overflow_is_refused_by_the_tensors_name(paths, tmp_path):
    big = {name: torch.full_like(value, 60_000) for name, value in load_file(paths[0] / "model.safetensors").items()}
    write(tmp_path / "big", big)
    named = ["--model", str(tmp_path / "big"), "--model", str(tmp_path / "big"), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"\.weight would hold NaN or infinity .*: it overflows float16"):
        main.run(["merge", "--method", "linear", "--normalize", "false", *named, "--out-dtype", "float16"])
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.merging").exists()


@pytest.mark.parametrize("method", ["linear", "ties", "model_stock", "passthrough"])
def test_an_input_with_nan_is_refused_by_the_tensors_name(method, paths, tmp_path):
    bad = load_file(paths[1] / "model.safetensors")
    bad["model.layers.1.mlp.up_proj.weight"][7, 7] = torch.nan
    write(tmp_path / "bad", bad)
    flags = ["--base", str(paths[0])] if method in ("ties", "model_stock") else []
    others = [] if method == "passthrough" else ["--model", str(paths[2])]
    if method == "ties":
        flags += ["--density", "0.3"]
    given = ["merge", "--method", method, "--model", str(tmp_path / "bad"), *others, *flags, "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity in .*bad"):
        main.run(given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "sound"), [(1.0, True), (0, True), (True, True), (0.5, False), ("yes", False)])
def test_booleans_may_be_numbers_as_mergekit_takes_them(value, sound, paths, tmp_path):
    recipe = {
        "merge_method": "ties", "base_model": str(paths[0]),
        "models": [{"model": str(paths[1]), "parameters": {"weight": 1, "density": 0.5}}],
        "parameters": {"normalize": value, "int8_mask": value},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    given = ["merge", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "out")]
    if sound:
        assert main.run(given) == 0
        return
    with pytest.raises(UserError, match=r"normalize of .* must be true or false"):
        main.run(given)


def test_a_limit_on_memory_is_one_line(paths, tmp_path):
    given = ["merge", "--method", "linear", "--model", str(paths[1]), "--model", str(paths[2]), "--out", str(tmp_path / "out")]
    program = (
        "import resource, sys\nfrom distmerge.cli import main as cli\nimport torch, distmerge.merging.execute\n"
        "taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (taken + (2 << 20),) * 2)\n"
        f"sys.argv = ['distmerge', *{given!r}]\ncli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("error: out of memory") and "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", ["train --help", "diagnose", "merge"])
def test_a_reader_that_has_gone_is_one_line(arguments, paths, tmp_path):
    base, one, two = map(str, paths)
    more = {
        "diagnose": f"{one} {two} --base {base}",
        "merge": f"--method linear --model {one} --model {two} --out {tmp_path}/out",
    }
    given = f"{arguments} {more.get(arguments, '')}".split()
    into, out = os.pipe()
    os.close(into)
    done = subprocess.run([sys.executable, "-m", "distmerge", *given], stdout=out, stderr=subprocess.PIPE, text=True)
    os.close(out)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: standard output was closed before everything was written"]
