"""Merging on disk: time and memory against mergekit 0.1.5 and against reading the inputs and writing the output.

mergekit runs in an environment of its own: ``--mergekit PYTHON``, or else one that this script makes in OUT. Both tools get the
same YAML recipe, whole processes are timed with a warm cache, and anonymous memory is sampled while they run. DARE draws
different masks in the two; how many elements are kept is the same. A base and two models near it: linear merges the two.

Measurements are kept in OUT turn by turn, and so are the models: with ``--minutes`` a run stops in time, and the same command
goes on. A turn is, one after the other, the floor, distmerge and mergekit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any, NamedTuple

import torch
from report import Report, parser, spread
from safetensors.torch import save_file

METHODS = {"linear": 3.0, "task_arithmetic": 3.0, "ties": 8.0, "dare_ties": 8.0}
"""How many times faster than mergekit, at least."""

OURS = [sys.executable, "-m", "distmerge", "merge"]


class Size(NamedTuple):
    """Attributes: width, feed-forward width, layers, tokens of a Llama."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int


FULL, SMALL = Size(1024, 2816, 22, 32000), Size(512, 1408, 12, 8000)


class Run(NamedTuple):
    seconds: float
    anonymous: int
    said: str


def shapes(size: Size) -> dict[str, tuple[int, ...]]:
    h, i, v = size.hidden, size.inner, size.vocabulary
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for layer in range(size.layers):
        prefix = f"model.layers.{layer}."
        found |= {f"{prefix}self_attn.{name}_proj.weight": (h, h) for name in "qkvo"}
        found |= {f"{prefix}mlp.{name}_proj.weight": (i, h) for name in ("gate", "up")}
        found[prefix + "mlp.down_proj.weight"] = (h, i)
        found |= {f"{prefix}{name}_layernorm.weight": (h,) for name in ("input", "post_attention")}
    return found | {"model.norm.weight": (h,), "lm_head.weight": (v, h)}


def make_models(root: Path, size: Size) -> None:
    """base, a, b: bfloat16, a and b near the base."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers, "num_attention_heads": 8, "num_key_value_heads": 8, "vocab_size": size.vocabulary,
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    base: dict[str, torch.Tensor] = {}
    for seed, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(seed)
        content = {}
        for key, shape in shapes(size).items():
            noise = torch.randn(shape, generator=generator)
            content[key] = ((0.02 * noise) if seed == 0 else (base[key].float() + 0.002 * noise)).bfloat16()
        base = base or content
        (root / name).mkdir(parents=True)
        save_file(content, root / name / "model.safetensors", metadata={"format": "pt"})
        (root / name / "config.json").write_text(json.dumps(config))


def write_recipe(root: Path, method: str) -> Path:
    task = method != "linear"
    each = {"weight": 0.5} | ({"density": 0.5} if method in ("ties", "dare_ties") else {})
    recipe = {"merge_method": method, "models": [{"model": str(root / name), "parameters": each} for name in "ab"]}
    path = root / f"{method}.yaml"
    path.write_text(json.dumps(recipe | ({"base_model": str(root / "base")} if task else {})))  # JSON is YAML
    return path


def measure(command: list[str]) -> Run:
    """The command's wall time and largest anonymous memory, and what it said."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous(process.pid))
        time.sleep(0.005)
    seconds = time.perf_counter() - began
    said = process.stdout.read() if process.stdout else ""
    assert process.returncode == 0, f"{' '.join(command)} left with {process.returncode}"
    return Run(seconds, peak, said)


def anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def floor_seconds(inputs: list[Path], out: Path) -> float:
    """Read the inputs into one buffer, write one of their size, fsync."""
    buffer = bytearray(16 << 20)
    began = time.perf_counter()
    for path in inputs:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    left = inputs[0].stat().st_size
    with open(out, "wb", buffering=0) as file:
        while left > 0:
            left -= file.write(memoryview(buffer)[: min(left, len(buffer))]) or 0
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    out.unlink()
    return seconds


def mergekit_python(given: str | None, out: Path, report: Report) -> str | None:
    """A Python that has mergekit; None where it cannot be installed."""
    if given:
        return given
    home = out / "mergekit"
    python = home / "bin" / "python"
    if python.exists():
        return str(python)
    report.say("making an environment for mergekit 0.1.5")
    venv.create(home, with_pip=True)
    wanted = [f"torch=={torch.__version__.partition('+')[0]}", "mergekit==0.1.5"]
    done = subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted])
    return str(python) if done.returncode == 0 else None


class Turns:
    """What was measured so far, in a file: a list of turns for each model size and method."""

    def __init__(self, path: Path, minutes: float | None):
        self.path, self.deadline = path, None if minutes is None else time.monotonic() + 60 * minutes
        self.done: dict[str, list[dict[str, Any]]] = json.loads(path.read_text()) if path.exists() else {}

    def add(self, key: str, turn: dict[str, Any]) -> None:
        self.done.setdefault(key, []).append(turn)
        self.path.write_text(json.dumps(self.done, indent=1))

    def count(self, key: str) -> int:
        return len(self.done.get(key, []))

    @property
    def late(self) -> bool:
        return self.deadline is not None and time.monotonic() > self.deadline


def take_turn(method: str, root: Path, peer: str | None, with_peer: bool = True) -> dict[str, Any]:
    """The floor, distmerge and mergekit, each with its inputs in the page cache and nothing left to be written."""
    recipe, out = write_recipe(root, method), root / "out"
    shutil.rmtree(out, ignore_errors=True)
    inputs = [root / name / "model.safetensors" for name in (("a", "b") if method == "linear" else ("base", "a", "b"))]
    floor_seconds(inputs, root / "floor")
    os.sync()
    turn: dict[str, Any] = {"floor": floor_seconds(inputs, root / "floor")}
    commands = {"ours": [*OURS, str(recipe), "--out", str(out)]}
    if peer and with_peer:
        commands["mergekit"] = [peer, "-m", "mergekit.scripts.run_yaml", str(recipe), str(out), "--no-copy-tokenizer"]
    for name, command in commands.items():
        os.sync()
        run = measure(command)
        turn |= {name: run.seconds, f"{name}_anonymous": run.anonymous}
        if name == "ours":
            turn["work"] = float(run.said.rsplit(" s by ", 1)[0].rsplit(" ", 1)[1])
        shutil.rmtree(out)
    return turn


def judge(report: Report, method: str, turns: list[dict[str, Any]]) -> None:
    """One method's bars."""
    found: dict[str, Any] = {
        name: spread([turn[name] for turn in turns]) for name in ("ours", "work", "floor", "mergekit") if name in turns[0]
    }
    found |= {name: max(turn[name] for turn in turns) for name in turns[0] if name.endswith("_anonymous")}
    report.data[method] = found
    report.bar(f"{method}: anonymous memory in bytes", found["ours_anonymous"], "<=", 300e6)
    if method in ("linear", "task_arithmetic"):
        ratio = found["work"]["median"] / found["floor"]["median"]
        report.bar(f"{method}: work after imports over the floor", ratio, "<=", 2.5)
    if "mergekit" in found:
        ratio = found["mergekit"]["median"] / found["ours"]["median"]
        report.bar(f"{method}: times faster than mergekit, whole processes", ratio, ">=", METHODS[method], quality=True)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--mergekit", metavar="PYTHON", help="a Python that has mergekit 0.1.5")
    arguments.add_argument("--repeats", type=int, default=3)
    arguments.add_argument("--minutes", type=float, help="stop after the turn in which they are over; start again to go on")
    options = arguments.parse_args()
    report = Report("merge_speed", options)
    peer = mergekit_python(options.mergekit, report.out, report)
    if peer is None:
        report.say("mergekit cannot be installed here: its bars are not judged")
    size = SMALL if options.small else FULL
    report.data["size"] = size._asdict()
    turns = Turns(report.out / "turns.json", options.minutes)
    large = size._replace(layers=4 * size.layers, vocabulary=4 * size.vocabulary)
    wanted = [("one", size, method, options.repeats) for method in METHODS]
    wanted += [] if options.small else [("four", large, method, 1) for method in METHODS]
    for name, shape, method, repeats in wanted:
        root = report.out / "models" / name
        if not (root / "b" / "config.json").exists():
            shutil.rmtree(root, ignore_errors=True)
            make_models(root, shape)
        while turns.count(f"{name} {method}") < repeats:
            if turns.late:
                report.say(f"stopped before a turn of {method}; the same command goes on")
                return
            turns.add(f"{name} {method}", take_turn(method, root, peer, with_peer=name == "one"))
    for method in METHODS:
        judge(report, method, turns.done[f"one {method}"])
    for method in [] if options.small else METHODS:
        ratio = turns.done[f"four {method}"][0]["ours_anonymous"] / report.data[method]["ours_anonymous"]
        report.bar(f"{method}: anonymous memory for a model four times as large, over this one's", ratio, "<=", 1.2)
    shutil.rmtree(report.out / "models")
    turns.path.unlink()
    report.finish()


if __name__ == "__main__":
    main()
