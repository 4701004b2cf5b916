"""Every system call of every publication goes wrong in every way: a reader finds the old state or the new one, never a mix.

Of a block of the window, a published step, the final model with its summary, the record of the metrics, and a merge's output.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from distmerge.errors import UserError
from distmerge.files.directories import clear_leftovers, publish_directory, replace_file, verify
from distmerge.files.layout import lay_out
from distmerge.files.lines import Lines
from distmerge.files.manifest import MANIFEST, read_manifest
from distmerge.files.output import Output
from distmerge.rundir.layout import RunDirectory
from distmerge.trainer.ending import publish_end
from distmerge.windows.blocks import RECORD, Block, published_blocks, record_of
from tests.faults.disk import ERRORS, KILLS, FaultyDisk, Killed

FAULTS = [*KILLS, *ERRORS]


def save(directory: Path, step: int) -> None:
    """A model directory as transformers writes one: through none of the calls that are counted."""
    save_file({"w": torch.full((50, 7), float(step))}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"step": step}))
    (directory / "chat_templates").mkdir()
    (directory / "chat_templates" / "tool.jinja").write_text(f"{step}")


def step_in(directory: Path) -> int:
    """The step that all of a model directory is of."""
    steps = {int(load_file(directory / "model.safetensors")["w"].unique().item())}
    steps |= {json.loads((directory / "config.json").read_text())["step"]}
    steps |= {int((directory / "chat_templates" / "tool.jinja").read_text())}
    assert len(steps) == 1, f"{directory} is a mix of steps {steps}"
    return steps.pop()


def sound(directory: Path, name: str = MANIFEST) -> int | None:
    """The step of a published directory, which must be whole; None where there is none."""
    if not directory.exists():
        return None
    assert verify(directory, name=name) is None, verify(directory, name=name)
    return step_in(directory)


class Case(NamedTuple):
    """Attributes: write: publishes state 1 or 2 under a folder; found: which of them a start finds there, 0 for none."""

    write: Callable[[Path, int], None]
    found: Callable[[Path], int]


def write_block(folder: Path, number: int) -> None:
    root = folder / "window"
    clear_leftovers(root)
    block = Block(number, number, 0, number, 1e-3, 2.0, "mean", 0)
    publish_directory(root / block.name, record_of(block), lambda directory: save(directory, number), RECORD)


def found_block(folder: Path) -> int:
    clear_leftovers(folder / "window")
    steps = [sound(path, RECORD) for path in published_blocks(folder / "window")]
    assert steps in ([1], [1, 2])
    return len(steps)


def write_step(folder: Path, number: int) -> None:
    """The same step again, of another course: in place of the first."""
    place = folder / "steps" / "step-00000008"
    publish_directory(place, {"step": 8, "course": number}, lambda directory: save(directory, number))


def found_step(folder: Path) -> int:
    place = folder / "steps" / "step-00000008"
    step = sound(place)
    assert step is not None, "a reader finds neither"
    assert read_manifest(place)["course"] == step
    return step


def write_end(folder: Path, number: int) -> None:
    summary = {
        "steps": number, "stopped": None, "workers": 1, "ranks": 1, "eval_loss_first": 3.0, "eval_loss_last": 2.0, "tokens": 1,
        "tokens_per_second": 1.0, "bytes_sent": 0, "bytes_sent_by_data_parallelism": 0, "diverged": None,
    }  # fmt: skip
    publish_end(RunDirectory(folder), {"step": number}, summary, lambda directory: save(directory, number))


def found_end(folder: Path) -> int:
    """What is told as finished is the model that is there; otherwise the run goes on, and publishes its end again."""
    run = RunDirectory(folder)
    step = sound(run.final)
    assert step is not None, "a reader finds neither"
    for asked in (1, 2):
        summary = run.finished(asked)
        assert summary is None or (summary["steps"] == step and step >= asked)
    return step


def write_lines(folder: Path, number: int) -> None:
    """A start cuts the record back to what the checkpoint remembers; what the next one remembers is on the disk."""
    log = Lines(folder / "metrics.jsonl", remembered(folder))
    for line in range(3):
        log.append({"step": number, "line": line, "text": "x" * 100})
    publish_directory(folder / "checkpoint", {"step": number}, lambda path: remember(path, log.sync()))
    log.append({"step": number, "line": 3})  # no checkpoint remembers this one
    log.close()


def remember(directory: Path, size: int) -> None:
    (directory / "bytes.json").write_text(str(size))


def remembered(folder: Path) -> int:
    path = folder / "checkpoint"
    assert not path.exists() or verify(path) is None
    return int((path / "bytes.json").read_text()) if path.exists() else 0


def found_lines(folder: Path) -> int:
    size = remembered(folder)
    log = Lines(folder / "metrics.jsonl", size)
    lines = list(log.read())
    log.close()
    assert log.bytes == size and log.cut_bytes == 0, "the record lost what a checkpoint remembers"
    steps = [line["step"] for line in lines]
    assert steps[:3] == [1] * 3 and set(steps[3:]) <= {2} and len(steps) % 3 == 0
    return 1 if len(steps) == 3 else 2


def write_output(folder: Path, number: int) -> None:
    """A merge never replaces an output: the second one has another name."""
    shards = lay_out({"w": ("F32", (300,))}, 1 << 20)
    output = Output(folder / f"merged-{number}", f"recipe {number}", shards)
    place = shards[0]
    output.write(place, place.offsets["w"], memoryview(torch.full((300,), float(number)).numpy().tobytes()))
    output.finish("w")
    output.publish({"config.json": json.dumps({"step": number}).encode()})


def found_output(folder: Path) -> int:
    for number in (1, 2):
        path = folder / f"merged-{number}"
        if path.exists():
            (shard,) = path.glob("*.safetensors")
            assert load_file(shard)["w"].unique().tolist() == [number]
            assert json.loads((path / "config.json").read_text()) == {"step": number}
    return sum((folder / f"merged-{number}").exists() for number in (1, 2))


def write_state(folder: Path, number: int) -> None:
    """As a merger's state is kept beside a Trainer's checkpoint, which may be written again."""
    replace_file(folder / "state.json", {"step": number})


def found_state(folder: Path) -> int:
    return json.loads((folder / "state.json").read_text())["step"]


CASES = {
    "a block": Case(write_block, found_block),
    "a step that is published again": Case(write_step, found_step),
    "the final model of a run that went on": Case(write_end, found_end),
    "the record that a checkpoint remembers": Case(write_lines, found_lines),
    "a merge's output": Case(write_output, found_output),
    "a file that replaces another": Case(write_state, found_state),
}


def write_over(case: Case, folder: Path, fault: str | None = None, at: int = -1) -> tuple[list[str], bool]:
    """State 1 is published in peace; the publication of state 2 meets the fault: the calls, and whether it came through."""
    folder.mkdir()
    case.write(folder, 1)
    with FaultyDisk(folder, fault, at) as disk, contextlib.suppress(UserError, OSError, Killed):
        case.write(folder, 2)
        return disk.calls, True
    return disk.calls, False


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", CASES)
def test_every_system_call(tmp_path: Path, name: str, fault: str) -> None:
    case = CASES[name]
    calls, _ = write_over(case, tmp_path / "whole")
    assert case.found(tmp_path / "whole") == 2
    names = [index for index, call in enumerate(calls) if call in ("rename", "exchange")]
    assert names, "nothing was given its name"
    for at in range(len(calls)):
        folder = tmp_path / str(at)
        made, whole = write_over(case, folder, fault, at)
        assert made[: at + 1] == calls[: at + 1]
        found = case.found(folder)
        where = f"{fault} at call {at} ({calls[at]})"
        if whole:  # such as a directory that could not be made, and was there
            assert found == 2, where
        elif at <= names[0]:
            assert found == 1, where
        elif fault not in ("undo", *ERRORS):
            assert found == 2, where
        case_again(case, folder)


def case_again(case: Case, folder: Path) -> None:
    """The next publication is as if nothing had been."""
    with contextlib.suppress(UserError):  # a merge's output that is there is refused
        case.write(folder, 2)
    assert case.found(folder) == 2


def test_at_least_600_points(tmp_path: Path) -> None:
    counts = [len(write_over(case, tmp_path / str(index))[0]) for index, case in enumerate(CASES.values())]
    assert sum(counts) * len(FAULTS) >= 600, counts


@pytest.mark.parametrize("name", CASES)
def test_a_full_disk_names_the_file(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    calls, _ = write_over(case, tmp_path / "whole")
    folder = tmp_path / "full"
    folder.mkdir()
    case.write(folder, 1)
    if "write" not in calls:
        pytest.skip("its bytes are written by pwrite, which names the directory")
    with FaultyDisk(folder, "enospc", calls.index("write")), pytest.raises((UserError, OSError)) as caught:
        case.write(folder, 2)
    said: Any = caught.value
    file = said.filename if isinstance(said, OSError) else str(said)
    assert Path(file.split(": ")[0].removeprefix("cannot write ")).suffix in (".json", ".jsonl", ".tmp"), said


# ---- what a crash leaves at a record's end


@pytest.mark.parametrize(
    "tail",
    [
        b'{"step": 9, "tr',
        b"\0" * 5000,
        b'{"step": 9}\0\0\n',
        b'{"step": "\xff\xfe"}\n',
        b"\xc3",
        b"\n\n",
        b"[1]\n",
        b"\0\n" * 9,
    ],
    ids=["a torn line", "zeros", "a line with zeros", "no UTF-8", "half a character", "empty", "no object", "lines of zeros"],
)
def test_what_is_no_line_is_cut_off(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "events.jsonl"
    good = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(good + tail)
    log = Lines(path)
    log.append({"step": 3})
    log.close()
    assert path.read_bytes() == good + b'{"step": 3}\n'
    assert log.cut_bytes == len(tail)


def test_a_damaged_line_in_the_middle_takes_no_other_with_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"step": 1}\n\0\0\0\n{"step": 3}\n')
    log = Lines(path)
    assert [line["step"] for line in log.read()] == [1, 3]
    log.close()
