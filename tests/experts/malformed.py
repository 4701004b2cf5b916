"""Runs each malformed input in a child of a process that has no torch, and prints what became of it, as JSON.

python -m tests.experts.malformed SCRATCH
"""

from __future__ import annotations

import json
import os
import struct
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distmerge.cli import main as cli

MODEL = {"weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
LINEAR = """merge_method: linear
models:
- model: {good}
  parameters: {{weight: 1}}
- model: {bad}
  parameters: {{weight: {w}}}
"""


def raw(path: Path, content: bytes, config: bytes = b"{}") -> Path:
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(content)
    (path / "config.json").write_bytes(config)
    return path


def framed(header: bytes, data: bytes = b"\0" * 24) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def tensors(table: Any, data: bytes = b"\0" * 24) -> bytes:
    return framed(json.dumps(table).encode(), data)


def changed(**entry: Any) -> bytes:
    return tensors({"weight": MODEL["weight"] | entry})


HEADERS: dict[str, bytes] = {
    "empty file": b"",
    "four bytes": b"\1\2\3\4",
    "length of 2^63": struct.pack("<Q", 1 << 63) + b"{}",
    "length past the end": struct.pack("<Q", 1000) + b"{}",
    "header cut off": tensors(MODEL)[:40],
    "data cut off": tensors(MODEL)[:-1],
    "data too long": tensors(MODEL) + b"\0",
    "zero header": framed(b"", b""),
    "header is a list": framed(b"[]"),
    "header is a number": framed(b"7"),
    "header is not JSON": framed(b"{'weight': 1}"),
    "header is not UTF-8": framed(b'{"\xff\xfe": {}}'),
    "nested too deep": framed(b"[" * 100_000),
    "nested with dtypes": framed(b'{"dtype":' * 100_000),
    "six million lists": framed(b"[" + b"[]," * 2_000_000 + b"[]]"),
    "header of 9 MB": framed(b'{"a":1,' + b" " * 9_000_000 + b"}"),
    "long numbers": framed(b'{"weight":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,24]}}'),
    "metadata of many numbers": tensors({"__metadata__": {str(i): i for i in range(400_000)}} | MODEL),
    "name twice": framed(
        b'{"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]},"w":{"dtype":"F32","shape":[6],"data_offsets":[0,24]}}'
    ),
    "entry is a list": tensors({"weight": []}),
    "no shape": tensors({"weight": {"dtype": "F32", "data_offsets": [0, 24]}}),
    "an unknown key": changed(stride=[1]),
    "unknown dtype": changed(dtype="F31"),
    "dtype is a list": changed(dtype=["F32"]),
    "negative dimension": changed(shape=[-2, -3]),
    "dimension is a float": changed(shape=[2.0, 3]),
    "dimension is true": changed(shape=[True, 6]),
    "absurd shape": changed(shape=[1 << 40, 1 << 40]),
    "shape too small": changed(shape=[2, 2]),
    "forty dimensions": changed(shape=[1] * 38 + [2, 3]),
    "offsets reversed": changed(data_offsets=[24, 0]),
    "offsets past the end": changed(data_offsets=[0, 1 << 50]),
    "offsets negative": changed(data_offsets=[-24, 0]),
    "three offsets": changed(data_offsets=[0, 12, 24]),
    "a hole": tensors({"a": {"dtype": "U8", "shape": [4], "data_offsets": [20, 24]}}),
    "overlap": tensors({n: {"dtype": "U8", "shape": [16], "data_offsets": [s, s + 16]} for n, s in (("a", 0), ("b", 8))}),
    "name of 100 kB": tensors({"w" * 100_000: MODEL["weight"]}),
    "name with a line break": tensors({"a\nb": MODEL["weight"]}),
    "metadata is a list": tensors({"__metadata__": []} | MODEL),
    "another shape": tensors({"weight": MODEL["weight"] | {"shape": [3, 2]}}),
    "another name": tensors({"weights": MODEL["weight"]}),
    "integers for floats": changed(dtype="I32"),
}


def recipe(root: Path, bad: Path, weight: str = "1") -> list[str]:
    good = raw(root / "good", tensors(MODEL))
    path = root / "recipe.yaml"
    path.write_text(LINEAR.format(good=good, bad=bad, w=weight))
    return ["merge", str(path), "--out", str(root / "out")]


def index(root: Path, table: Any) -> list[str]:
    bad = raw(root / "bad", tensors(MODEL))
    (bad / "model.safetensors").rename(bad / "one.safetensors")
    (bad / "model.safetensors.index.json").write_text(json.dumps(table))
    return recipe(root, bad)


def pickled(root: Path, flags: list[str]) -> list[str]:
    bad = root / "bad"
    bad.mkdir(parents=True)
    with zipfile.ZipFile(bad / "pytorch_model.bin", "w") as file:
        file.writestr("archive/data.pkl", b"cos\nsystem\n(S'touch pwned'\ntR.")
    return recipe(root, bad) + flags


def text(root: Path, content: str, name: str = "recipe.yaml") -> list[str]:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)
    return ["merge", str(root / name), "--out", str(root / "out")]


def flags(root: Path, *more: str) -> list[str]:
    good = raw(root / "good", tensors(MODEL))
    return ["merge", "--out", str(root / "out"), "--model", str(good), *more]


OTHERS: dict[str, Callable[[Path], list[str]]] = {
    "weight is NaN": lambda root: recipe(root, raw(root / "bad", tensors(MODEL)), ".nan"),
    "weight is infinite": lambda root: recipe(root, raw(root / "bad", tensors(MODEL)), ".inf"),
    "weight is a word": lambda root: recipe(root, raw(root / "bad", tensors(MODEL)), "heavy"),
    "weights sum to 0": lambda root: recipe(root, raw(root / "bad", tensors(MODEL)), "-1"),
    "no such model": lambda root: recipe(root, root / "nowhere"),
    "an empty directory": lambda root: ((root / "bad").mkdir(parents=True), recipe(root, root / "bad"))[1],
    "config is not JSON": lambda root: recipe(root, raw(root / "bad", tensors(MODEL), b"{")),
    "path traversal": lambda root: index(root, {"weight_map": {"weight": "../good/model.safetensors"}}),
    "absolute shard": lambda root: index(root, {"weight_map": {"weight": "/etc/passwd"}}),
    "missing shard": lambda root: index(root, {"weight_map": {"weight": "two.safetensors"}}),
    "index of a wrong name": lambda root: index(root, {"weight_map": {"other": "one.safetensors"}}),
    "index of numbers": lambda root: index(root, {"weight_map": {"weight": 7}}),
    "index is a list": lambda root: index(root, []),
    "a pickle": lambda root: pickled(root, []),
    "YAML is broken": lambda root: text(root, "models: [\n"),
    "YAML of objects": lambda root: text(root, "!!python/object/apply:os.system ['touch pwned']\n"),
    "YAML refers to itself": lambda root: text(root, "merge_method: linear\nmodels: &a [*a]\n"),
    "an unknown key in YAML": lambda root: text(root, "merge_method: linear\nmodles: []\n"),
    "modules": lambda root: text(root, "merge_method: linear\nmodules: {}\n"),
    "an unknown method": lambda root: text(root, "merge_method: karcher\nmodels: [{model: a}]\n"),
    "TOML is broken": lambda root: text(root, "method = ", "recipe.toml"),
    "recipe of 2 MB": lambda root: text(root, "# " + "x" * (2 << 20)),
    "layers reversed": lambda root: text(
        root, "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [4, 2]}]}]\n"
    ),
    "density of 0": lambda root: flags(root, "--method", "ties", "--base", str(root / "base"), "--density", "0"),
    "a missing base": lambda root: flags(root, "--method", "ties"),
    "an output that exists": lambda root: (
        (root / "out").mkdir(parents=True), flags(root, "--method", "linear")
    )[1],
}  # fmt: skip


def attempt(arguments: list[str], scratch: Path) -> dict[str, Any]:
    """The command in a child: its exit status, what it said, its largest memory."""
    said = scratch / "said"
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        with open(said, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.argv = ["distmerge", *arguments]
        try:
            cli.main()
        except SystemExit as exit:
            sys.stderr.flush()
            os._exit(exit.code if isinstance(exit.code, int) else 1)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(99)
    _, status, usage = os.wait4(child, 0)
    seconds = time.monotonic() - began
    return {
        "status": os.waitstatus_to_exitcode(status), "said": said.read_text(), "bytes": usage.ru_maxrss * 1024,
        "seconds": seconds, "published": (scratch / "out" / "merge.json").exists(),
    }  # fmt: skip


def main(root: Path) -> None:
    cases: dict[str, Callable[[Path], list[str]]] = {
        name: lambda place, content=content: recipe(place, raw(place / "bad", content)) for name, content in HEADERS.items()
    }
    found = {}
    for number, (name, make) in enumerate((cases | OTHERS).items()):
        place = root / str(number)
        place.mkdir(parents=True)
        found[name] = attempt(make(place), place)
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
