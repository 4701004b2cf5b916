"""``distmerge verify`` hashes everything again and names what is damaged."""

from pathlib import Path

import pytest
import torch

from distmerge.checkpoints.verify import verify_run
from distmerge.errors import UserError
from distmerge.files.directories import publish, write_file


def publish_step(root: Path, step: int) -> Path:
    temporary = root / f".step-{step:08}"
    temporary.mkdir(parents=True)
    entries = {"a.safetensors": write_file(temporary / "a.safetensors", {"x": torch.arange(5.0)})}
    publish(temporary, root / f"step-{step:08}", {"step": step, "files": entries})
    return root / f"step-{step:08}"


def test_says_what_is_damaged(tmp_path: Path) -> None:
    paths = [publish_step(tmp_path / "checkpoints", step) for step in (1, 2, 3, 4)]
    (paths[1] / "a.safetensors").unlink()
    paths[2].rename(paths[2].with_name("step-00000003.rejected"))
    paths[3].rename(paths[3].with_name("step-00000004.tainted"))
    verdicts = verify_run(tmp_path)
    assert [(verdict.path.removeprefix("checkpoints/step-0000000"), verdict.damaged) for verdict in verdicts] == [
        ("1", False), ("2", True), ("3.rejected", True), ("4.tainted", False)
    ]  # fmt: skip
    assert verdicts[0].said == "ok"
    assert "a.safetensors is missing" in verdicts[1].said
    assert "set aside" in verdicts[2].said


def test_nothing_to_verify(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must hold checkpoints"):
        verify_run(tmp_path)
    with pytest.raises(UserError, match="must be a run's directory"):
        verify_run(tmp_path / "nowhere")
