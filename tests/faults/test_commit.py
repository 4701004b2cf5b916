"""Every system call of a commit goes wrong in every way: a start finds the old state or the new one, never a mix."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from distmerge.checkpoints.store import Store, published_checkpoints
from distmerge.errors import UserError
from distmerge.files.directories import reader
from distmerge.mesh import Mesh
from tests.faults.disk import ERRORS, KILLS, FaultyDisk, Killed


def state(step: int) -> dict[str, Any]:
    """A small state in the files of a real one. Every tensor in it knows its step, so that a mix shows."""
    tensors = {f"layer.{index}": torch.full((40, 30 + index), float(step)) for index in range(3)}
    return {
        "parameters-00000.safetensors": tensors | {"half": torch.full((7,), step, dtype=torch.bfloat16)},
        "optimizer-00000.pt": [{"state": {0: {"exp_avg": torch.full((50,), float(step)), "step": torch.tensor(float(step))}}}],
        "rank-00000.pt": {"step": step, "generators": [torch.full((16,), step, dtype=torch.uint8), None]},
        "notes.json": {"step": step},
    }


def new_store(mesh: Mesh, root: Path, keep: int = 1, asynchronous: bool = False) -> Store:
    store = Store(root, mesh, keep, asynchronous)
    store.open()
    return store


def found(mesh: Mesh, root: Path, keep: int = 1) -> tuple[int, list[str]]:
    """What a start finds: the step whose state is whole, and what it says of those that it rejected."""
    path, rejections = new_store(mesh, root, keep).newest_valid()
    assert path is not None
    read = reader(path)
    step = read("notes.json")["step"]
    for file, content in state(step).items():
        assert equal(read(file), content), f"{path}/{file} is not of step {step}"
    return step, [f"{rejection.path.name}: {rejection.reason}" for rejection in rejections]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def commit_over_old(mesh: Mesh, root: Path, asynchronous: bool, fault: str | None = None, at: int = -1) -> FaultyDisk:
    """Step 1 is published in peace; the commit of step 2, with its retention, meets the fault."""
    new_store(mesh, root).commit(1, state(1))
    store = new_store(mesh, root, asynchronous=asynchronous)
    with FaultyDisk(root, fault, at) as disk, contextlib.suppress(UserError, Killed):
        store.commit(2, state(2))
        store.wait()
    return disk


@functools.cache
def calls_of_a_commit(mesh: Mesh) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory) / "checkpoints"
        disk = commit_over_old(mesh, root, asynchronous=False)
        assert found(mesh, root)[0] == 2
        return tuple(disk.calls)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("fault", [*KILLS, *ERRORS])
def test_every_system_call(mesh: Mesh, tmp_path: Path, fault: str, asynchronous: bool) -> None:
    calls = calls_of_a_commit(mesh)
    rename = calls.index("rename")
    for at in range(len(calls)):
        root = tmp_path / str(at)
        disk = commit_over_old(mesh, root, asynchronous, fault, at)
        assert tuple(disk.calls[: at + 1]) == calls[: at + 1]
        step, rejected = found(mesh, root)
        assert not rejected, f"{fault} at call {at} ({calls[at]}) left a damaged checkpoint: {rejected}"
        if fault != "undo":
            assert step == (1 if at <= rename else 2), f"{fault} at call {at} ({calls[at]})"
        new_store(mesh, root).commit(3, state(3))  # and the next commit is as if nothing had been
        assert found(mesh, root)[0] == 3


def test_at_least_200_points(mesh: Mesh) -> None:
    assert len(calls_of_a_commit(mesh)) * len([*KILLS, *ERRORS]) >= 200


def test_a_full_disk_is_told_in_one_line(mesh: Mesh, tmp_path: Path) -> None:
    new_store(mesh, tmp_path / "checkpoints").commit(1, state(1))
    store = new_store(mesh, tmp_path / "checkpoints")
    with (
        FaultyDisk(tmp_path, "enospc", calls_of_a_commit(mesh).index("write")),
        pytest.raises(UserError, match="No space left on device") as caught,
    ):
        store.commit(2, state(2))
    assert "\n" not in str(caught.value)


def test_an_error_behind_is_raised_at_the_next_call(mesh: Mesh, tmp_path: Path) -> None:
    store = new_store(mesh, tmp_path / "checkpoints", asynchronous=True)
    with FaultyDisk(tmp_path, "enospc", 2):
        store.commit(1, state(1))
        with pytest.raises(UserError, match="No space left"):
            store.wait()
    store.wait()  # it is told once


def flip(data: bytes, at: int, bit: int) -> bytes:
    at %= len(data)
    return data[:at] + bytes([data[at] ^ (1 << bit)]) + data[at + 1 :]


DAMAGE = {
    "flip the first bit": lambda data: flip(data, 0, 0),
    "flip a bit in the middle": lambda data: flip(data, len(data) // 2, 4),
    "flip the last bit": lambda data: flip(data, -1, 7),
    "truncate to nothing": lambda data: b"",
    "truncate by a half": lambda data: data[: len(data) // 2],
    "truncate by one": lambda data: data[:-1],
    "one byte more": lambda data: data + b"\0",
    "zeros": lambda data: bytes(len(data)),
    "delete": lambda data: None,
}

PUBLISHED = [*state(0), "manifest.json"]


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", PUBLISHED)
def test_damage_is_found_and_named(mesh: Mesh, tmp_path: Path, file: str, damage: str) -> None:
    root = tmp_path / "checkpoints"
    store = new_store(mesh, root, keep=2)
    store.commit(1, state(1))
    store.commit(2, state(2))
    harm(root / "step-00000002" / file, damage)
    step, rejected = found(mesh, root, keep=2)
    assert step == 1
    assert len(rejected) == 1 and rejected[0].startswith("step-00000002: ") and file in rejected[0]
    assert (root / "step-00000002.rejected").is_dir()


def harm(path: Path, damage: str) -> None:
    data = DAMAGE[damage](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)


def test_a_bit_anywhere_is_found(mesh: Mesh, tmp_path: Path) -> None:
    """A stride through every published file: whatever a bit belongs to, it is found."""
    root = tmp_path / "checkpoints"
    new_store(mesh, root).commit(1, state(1))
    store = new_store(mesh, root, keep=2)
    for file in PUBLISHED:
        path = root / "step-00000001" / file
        data = path.read_bytes()
        for at in range(0, len(data), max(1, len(data) // 10)):
            path.write_bytes(flip(data, at, at % 8))
            with pytest.raises(UserError, match=file):
                store.newest_valid()
        path.write_bytes(data)
    assert found(mesh, root)[0] == 1


def test_every_checkpoint_damaged_is_one_line_and_harms_nothing(mesh: Mesh, tmp_path: Path) -> None:
    root = tmp_path / "checkpoints"
    store = new_store(mesh, root, keep=2)
    for step in (1, 2):
        store.commit(step, state(step))
        harm(root / f"step-{step:08}" / "rank-00000.pt", "flip the last bit")
    with pytest.raises(UserError, match=r"step-00000002.*step-00000001") as caught:
        store.newest_valid()
    assert "\n" not in str(caught.value)
    assert len(published_checkpoints(root)) == 2


def test_retention_spares_the_newest_valid(mesh: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses what it was given, in silence: the older checkpoint is all there is, and stays."""
    root = tmp_path / "checkpoints"
    store = new_store(mesh, root, keep=1)
    store.commit(1, state(1))
    with LyingDisk(root, "step-00000002"), pytest.raises(UserError, match="does not read back"):
        store.commit(2, state(2))
    assert found(mesh, root)[0] == 1


class LyingDisk(FaultyDisk):
    """Damages a directory after it got its name."""

    def __init__(self, root: Path, name: str):
        super().__init__(root)
        self.victim = root / name

    def _note(self, name: str, path: str, arguments: tuple[Any, ...], result: Any) -> None:
        super()._note(name, path, arguments, result)
        if name == "rename" and Path(arguments[1]) == self.victim:
            harm(self.victim / "optimizer-00000.pt", "zeros")


def test_asynchronous_commits_hold_what_was_committed(mesh: Mesh, tmp_path: Path) -> None:
    """The state may change as soon as commit returns."""
    root = tmp_path / "checkpoints"
    store = new_store(mesh, root, keep=2, asynchronous=True)
    for step in (1, 2):
        live = state(step)
        store.commit(step, live)
        for tensor in live["parameters-00000.safetensors"].values():
            tensor.fill_(-1)
        live["rank-00000.pt"]["step"] = -1
    store.wait()
    assert found(mesh, root, keep=2)[0] == 2
