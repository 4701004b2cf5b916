"""The store, by real ranks: what is published is whole, what is damaged is named, and whatever fails harms nothing."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from distmerge.checkpoints.store import Store, published_checkpoints
from distmerge.config import train as config
from distmerge.errors import UserError
from distmerge.files.directories import reader, verify
from distmerge.files.manifest import MANIFEST, read_manifest
from distmerge.launch.ranks import Place
from distmerge.mesh import Mesh
from tests.ranks import Ranks


@contextlib.contextmanager
def opened(root: Path, workers: int = 1, keep: int = 3) -> Iterator[Store]:
    """A store in a rank, among all of them."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    mesh = Mesh(config.MeshSettings(workers=workers, timeout_seconds=600), Place(rank, world, rank, world), threads=1)
    with contextlib.closing(mesh):
        store = Store(root, mesh, keep)
        store.open()
        yield store


def files_of(rank: int, step: int) -> dict[str, Any]:
    return {
        f"parameters-{rank}.safetensors": {"w": torch.arange(5.0) + step, "v": torch.ones(2, 3) * rank},
        f"rank-{rank}.pt": {"step": step, "generators": [torch.get_rng_state(), None], "nested": {"a": [1, 2.5, "x"]}},
        f"notes-{rank}.json": {"rank": rank},
    }


def commit(root: Path, steps: list[int], keep: int = 3) -> list[str]:
    with opened(root, keep=keep) as store:
        return [store.commit(step, files_of(store.mesh.rank, step)).name for step in steps]


def newest(root: Path, workers: int = 1) -> tuple[str | None, list[tuple[str, str]], str]:
    """The newest valid checkpoint, what was rejected, and the error, if any, on this rank."""
    with opened(root, workers) as store:
        try:
            path, rejections = store.newest_valid()
        except UserError as error:
            return None, [], str(error)
        except SystemExit as leave:
            return None, [], f"status {leave.code}"
        return path.name if path else None, [(r.path.name, r.reason) for r in rejections], ""


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def template(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 5 and 10, by two ranks."""
    root = tmp_path_factory.mktemp("store") / "checkpoints"
    ranks.run(2, commit, root, [5, 10], group=False)
    return root


@pytest.fixture
def root(template: Path, tmp_path: Path) -> Path:
    shutil.copytree(template, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


# ---- publishing


def test_what_was_committed_is_read_back(root: Path) -> None:
    read = reader(root / "step-00000010")
    for rank in (0, 1):
        for name, content in files_of(rank, 10).items():
            stored = read(name)
            if name.endswith("safetensors"):
                assert all(torch.equal(stored[key], content[key]) for key in content)
            elif name.endswith("json"):
                assert stored == content
            else:
                assert (stored["step"], stored["nested"]) == (10, {"a": [1, 2.5, "x"]})
    manifest = read_manifest(root / "step-00000010")
    assert (manifest["step"], manifest["world"], manifest["workers"]) == (10, 2, 1)
    assert len(manifest["files"]) == 6


def test_only_the_newest_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(2, commit, tmp_path, [1, 2, 3, 4, 5], 2, group=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000004", "step-00000005"]


def test_steps_are_ordered_as_numbers(ranks: Ranks, tmp_path: Path) -> None:
    ranks.run(1, commit, tmp_path, [9, 10, 100, 99_999_999], 9, group=False)
    assert [path.name for path in published_checkpoints(tmp_path)] == [f"step-{step:08}" for step in (9, 10, 100, 99_999_999)]


def test_no_checkpoint_is_no_error(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks.run(2, newest, tmp_path / "new", group=False) == [(None, [], "")] * 2
    assert (tmp_path / "new").is_dir()


def test_what_an_interrupted_commit_left_is_cleared(ranks: Ranks, root: Path) -> None:
    for leftover in (".step-00000015", ".doomed-step-00000001"):
        (root / leftover).mkdir()
        (root / leftover / "half").write_text("x")
    assert ranks.run(2, newest, root, group=False) == [("step-00000010", [], "")] * 2
    assert sorted(path.name for path in root.iterdir()) == ["step-00000005", "step-00000010"]


# ---- damage


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def remove(path: Path) -> None:
    path.unlink()


def other_json(path: Path) -> None:
    path.write_text("null")


NAMES = [*files_of(0, 0), *files_of(1, 0), MANIFEST]


@pytest.mark.parametrize("damage", [flip, truncate, lengthen, empty, remove, other_json])
@pytest.mark.parametrize("name", NAMES)
def test_any_damage_to_any_file_is_found_and_named(root: Path, name: str, damage: Callable[[Path], None]) -> None:
    damage(root / "step-00000010" / name)
    problem = verify(root / "step-00000010")
    assert problem is not None
    assert problem.startswith(name), problem
    assert verify(root / "step-00000005") is None


@pytest.mark.parametrize("name", [NAMES[0], NAMES[4], MANIFEST])
def test_the_one_before_a_damaged_one_serves(ranks: Ranks, root: Path, name: str) -> None:
    flip(root / "step-00000010" / name)
    (first, rejected, error), second = ranks.run(2, newest, root, group=False)
    assert (first, rejected, error) == second
    assert (first, error) == ("step-00000005", "")
    assert [path for path, _ in rejected] == ["step-00000010"]
    assert rejected[0][1].startswith(name)
    assert sorted(path.name for path in root.iterdir()) == ["step-00000005", "step-00000010.rejected"]
    ranks.run(2, commit, root, [10], group=False)
    assert verify(root / "step-00000010") is None, "the step can be published again"


def test_a_checkpoint_under_another_ones_name(ranks: Ranks, root: Path) -> None:
    (root / "step-00000010").rename(root / "step-00000011")
    assert ranks.run(2, newest, root, group=False)[0] == ("step-00000005", [("step-00000011", f"{MANIFEST} says step 10")], "")


def test_all_damaged_is_one_error(ranks: Ranks, root: Path) -> None:
    for step in ("step-00000005", "step-00000010"):
        flip(root / step / "rank-0.pt")
    before = snapshot(root)
    first, second = ranks.run(2, newest, root, group=False)
    reason = f"rank-0.pt does not have the SHA-256 that {MANIFEST} says"
    assert first[2] == (
        f"every checkpoint in {root} is damaged (step-00000010: {reason}; step-00000005: {reason}); "
        "move them away to start from scratch"
    )
    assert second[2] == "status 2", "told once"
    assert snapshot(root) == before


def test_another_mesh_is_refused(ranks: Ranks, root: Path) -> None:
    first, second = ranks.run(2, newest, root, 2, group=False)
    assert first[2] == (
        f"{root}/step-00000010 was written by 2 ranks in 1 workers, got 2 ranks in 2; "
        "resume with the same numbers, or take another --run-dir"
    )
    assert second[2] == "status 2"


def test_a_pickle_with_code_is_not_read(tmp_path: Path) -> None:
    torch.save({"x": print}, tmp_path / "rank-0.pt")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        reader(tmp_path)("rank-0.pt")


# ---- a disk that is full


def commit_in_little_room(root: Path, limit_bytes: int) -> str:
    """A commit whose files may not grow beyond a limit, on rank 1 alone."""
    with opened(root) as store:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        big = files_of(store.mesh.rank, 15) | {f"big-{store.mesh.rank}.safetensors": {"x": torch.zeros(50_000)}}
        big |= {f"big-{store.mesh.rank}.pt": torch.zeros(50_000)}
        if store.mesh.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limits[1]))
        try:
            store.commit(15, big)
            said = "committed"
        except UserError as error:
            said = str(error)
        except SystemExit as leave:
            said = f"status {leave.code}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return said


@pytest.mark.parametrize("limit_bytes", [0, 10, 4096, 100_000])
def test_no_room_is_the_users_error_and_harms_nothing(ranks: Ranks, root: Path, limit_bytes: int) -> None:
    before = snapshot(root)
    first, second = ranks.run(2, commit_in_little_room, root, limit_bytes, group=False)
    assert first == "status 2"
    assert second.startswith(f"cannot write {root}/.step-00000015/")
    assert "File too large" in second
    assert second.endswith("; free some space or take another run_dir, and start again")
    after = snapshot(root)
    assert {name: after[name] for name in before} == before
    ranks.run(2, commit, root, [15], group=False)
    assert not list(root.glob(".*")), "the next start clears what was begun"
    assert verify(root / "step-00000015") is None


def test_manifests_are_plain_json(root: Path) -> None:
    manifest = json.loads((root / "step-00000005" / MANIFEST).read_text())
    assert manifest["files"]["rank-0.pt"]["bytes"] == (root / "step-00000005" / "rank-0.pt").stat().st_size
